"""Models to and from Hugging Face's format, and the comparison of both."""
