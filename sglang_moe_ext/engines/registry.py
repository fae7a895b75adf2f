"""The engines that can be tuned, by name."""

from __future__ import annotations

from collections.abc import Mapping

from sglang_moe_ext.engines.adapter import EngineName, Tunable
from sglang_moe_ext.engines.sglang import adapter as sglang
from sglang_moe_ext.engines.vllm import adapter as vllm

SGLANG: Tunable = sglang
VLLM: Tunable = vllm
ENGINES: Mapping[EngineName, Tunable] = {"sglang": SGLANG, "vllm": VLLM}
