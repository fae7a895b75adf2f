"""What a user asks a tuning run for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import Gpu, MoEShape
from sglang_moe_ext.tuning.destinations import Install

Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class Request:
    """One layer on one GPU. `gpu_is_here`: this machine has that GPU; `measure`: time on it, rather than predict.

    `vllm_shape` is the layer as vLLM would launch it, None where that is unknown or impossible.
    """

    model: str
    architecture: str
    shape: MoEShape
    vllm_shape: MoEShape | None
    gpu: Gpu
    gpu_is_here: bool
    tokens: tuple[int, ...]
    measure: bool
    install: Install
    output_dir: Path | None
    seed: int
    command: str
