"""Distillation: the teacher model, its logits cached on disk, and the losses."""
