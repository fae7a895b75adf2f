"""Our Triton kernels, one file each, and reference.py, plain torch, which is their meaning."""
