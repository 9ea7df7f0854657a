"""The C builder, and the compiled reading of rows."""
