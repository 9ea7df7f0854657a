"""Quantised weights: rounding, calibration, the files of compressed-tensors, and models that run with them."""
