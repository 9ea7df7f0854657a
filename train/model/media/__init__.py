"""Encoders of images and audio: from patches and log-mel frames of a microbatch to features at the places of placeholders."""

import train.megatron  # noqa: F401  prepares Megatron before a module of this package imports it
