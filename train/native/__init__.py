"""C kernels for CPUs, each with its binding."""
