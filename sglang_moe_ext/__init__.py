"""Fast and safe fused-MoE kernel configurations for SGLang and vLLM, found for your model on your GPU."""

__version__ = "0.1.0"
