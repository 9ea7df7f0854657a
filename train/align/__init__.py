"""Alignment: losses on preferences and rewards, verifiers, and merging of trained models."""
