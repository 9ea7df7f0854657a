"""Copies of the training state in the memory of nodes: made while training continues, restored without storage."""
