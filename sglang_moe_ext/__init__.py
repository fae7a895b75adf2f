"""Fused-MoE kernel configurations that are right, fast and picked up by themselves, for SGLang and vLLM."""

__version__ = "0.1.0"
