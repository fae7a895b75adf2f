"""This package's Triton kernels, one file each, and `reference`, the same operations in plain torch."""
