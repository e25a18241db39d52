"""Triton kernels: each file holds one kernel family with its source, tile configs and limits."""
