"""Low-precision recipes: quantisers, the emulated and the Transformer Engine backend, health."""

import train.megatron  # noqa: F401  prepares Megatron before a module of this package imports it
