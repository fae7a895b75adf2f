"""Fused-MoE kernel configurations that are right, fast and picked up by themselves, for SGLang and vLLM."""

__version__ = "0.1.0"

SWITCH = "SGLANG_MOE_EXT_DISABLE"
"""The variable that, set to 1, keeps all of this out of a process."""
