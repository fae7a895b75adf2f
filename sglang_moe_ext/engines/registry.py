"""The engines that can be tuned, by name."""

from __future__ import annotations

from collections.abc import Mapping

from sglang_moe_ext.engines.adapter import EngineAdapter, EngineName
from sglang_moe_ext.engines.sglang import adapter as sglang
from sglang_moe_ext.engines.vllm import adapter as vllm

SGLANG: EngineAdapter = sglang
VLLM: EngineAdapter = vllm
ENGINES: Mapping[EngineName, EngineAdapter] = {"sglang": SGLANG, "vllm": VLLM}
