"""Process groups, and how a built model is wrapped for data parallelism."""

import train.megatron  # noqa: F401  prepares Megatron before a module of this package imports it
