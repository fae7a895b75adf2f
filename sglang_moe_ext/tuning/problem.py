"""What is tuned: one MoE layer on one GPU for one engine."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from sglang_moe_ext.core import Gpu, MoEShape
from sglang_moe_ext.engines.adapter import EngineAdapter, EngineName
from sglang_moe_ext.engines.registry import ENGINES


@dataclass(frozen=True, slots=True)
class Problem:
    """One layer as one rank of that engine launches it, and the GPU, which need not be on this machine."""

    shape: MoEShape
    gpu: Gpu
    engine: EngineName

    @property
    def adapter(self) -> EngineAdapter:
        return ENGINES[self.engine]

    @property
    def triton(self) -> str:
        """The Triton that compiles here; empty where there is none."""
        try:
            return importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            return ""

    def representative_tokens(self, tokens: int) -> int:
        """The smallest batch size whose launch runs the same binaries as this one's."""
        return self.adapter.representative_tokens(self.shape, tokens)
