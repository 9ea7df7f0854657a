"""Evaluation: held-out loss, tasks, and confidence intervals of their scores."""
