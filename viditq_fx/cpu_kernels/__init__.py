"""Kernels of our own for CPUs, in C++ that is compiled on the user's machine at its first use."""
