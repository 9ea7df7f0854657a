"""The optimizer."""

import train.megatron  # noqa: F401  prepares Megatron before a module of this package imports it
