"""Compiles the kernels ahead of time and reports what the compiler made of them."""
