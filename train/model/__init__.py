"""The architecture: layers, attention, the Mamba-2 scan, norms, head; and which modules a backend names."""

import train.megatron  # noqa: F401  readies Megatron before a module of this package imports it
