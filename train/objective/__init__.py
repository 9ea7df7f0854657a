"""The next-token objective (distillation: train/distill)."""
