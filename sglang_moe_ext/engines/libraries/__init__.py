"""Fused-MoE kernels of other libraries, as `bench` compares them: one module each, with one `LayerLibrary`."""
