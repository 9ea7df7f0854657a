"""The optimizer."""

import train.megatron  # noqa: F401  readies Megatron before a module of this package imports it
