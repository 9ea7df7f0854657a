"""The architecture: layers, attention, the Mamba-2 scan, norms and the head; and the modules of each backend."""

import train.megatron  # noqa: F401  prepares Megatron before a module of this package imports it
