"""Distillation: the teacher model, its logits cached on disk, and the losses."""

import train.megatron  # noqa: F401  prepares Megatron before a module of this package imports it
