"""Conversion of models to and from Hugging Face's format, and comparison with transformers."""
