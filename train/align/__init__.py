"""Alignment: learning from preferences and rewards, verifiers, and preferences among a model's own answers."""
