"""Test support: check CUDA kernels and Inductor's CUDA code on a machine that has no GPU."""
