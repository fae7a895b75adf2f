"""Where vLLM runs another MoE backend than its Triton one, which alone reads a table, as long as nobody chooses one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sglang_moe_ext.core import Gpu, MoEShape
from sglang_moe_ext.engines.vllm.hook_points import LOOKUP

_AMPERE, _HOPPER, _BLACKWELL, _SMALL_BLACKWELL = (80, 86, 87), (90,), (100, 103), (120, 121)


@dataclass(frozen=True, slots=True)
class OtherVllmBackend:
    """Where `--moe-backend auto` takes, or may take, another backend. Read in the oracles of vLLM 0.33.0."""

    backend: str
    applies: Callable[[MoEShape, Gpu], bool]


def _is_block_wise_fp8(shape: MoEShape) -> bool:
    return shape.quantization.scheme == "fp8_w8a8" and shape.quantization.is_block_wise


def _is_fp8_by_channel(shape: MoEShape) -> bool:
    return shape.quantization.scheme == "fp8_w8a8" and shape.quantization.per_channel


_OTHERS = (
    OtherVllmBackend("Marlin or Humming", lambda shape, gpu: shape.quantization.scheme == "int4_w4a16"),
    OtherVllmBackend("Marlin", lambda shape, gpu: shape.quantization.scheme == "fp8_w8a8" and gpu.sm in _AMPERE),
    OtherVllmBackend("FlashInfer", lambda shape, gpu: shape.quantization.scheme is None and gpu.sm in _BLACKWELL),
    OtherVllmBackend("FlashInfer", lambda shape, gpu: shape.quantization.scheme is None and gpu.sm in _SMALL_BLACKWELL),
    OtherVllmBackend("FlashInfer or DeepGEMM", lambda shape, gpu: _is_block_wise_fp8(shape) and gpu.sm in _BLACKWELL),
    OtherVllmBackend("DeepGEMM", lambda shape, gpu: _is_block_wise_fp8(shape) and gpu.sm in _SMALL_BLACKWELL),
    OtherVllmBackend("FlashInfer", lambda shape, gpu: _is_block_wise_fp8(shape) and gpu.sm in _HOPPER and shape.ep > 1),
    OtherVllmBackend("CUTLASS", lambda shape, gpu: _is_fp8_by_channel(shape) and gpu.sm in (*_HOPPER, *_BLACKWELL)),
)


def why_no_table(shape: MoEShape, gpu: Gpu, architecture: str) -> str | None:
    """Why a server does not, or may not, read a table for the layer; None: it does."""
    if architecture == "GptOssForCausalLM":
        return "gpt-oss in mxfp4 runs on backends that read no table (the server's log names its choice)"
    found = next((other for other in _OTHERS if other.applies(shape, gpu)), None)
    if found is None:
        return None
    return (
        f"vLLM takes {found.backend} for such a layer on this GPU, which reads no table: --moe-backend triton makes "
        "sure that it does (the server's log names its choice)"
    )


_PARTS = ("experts", "fallback_experts")
"""Of experts that choose between two others at each call."""


def read_tables(experts: object) -> bool:
    """True where some method of theirs, or of the experts that they choose from, names the lookup.

    One that a subclass has replaced counts: better a table in vain than one called useless that is not.
    """
    parts = [experts, *(part for name in _PARTS if (part := getattr(experts, name, None)) is not None)]
    return any(LOOKUP in names for part in parts for names in _names(type(part)))


def _names(kind: type) -> Iterator[tuple[str, ...]]:
    for base in kind.__mro__:
        for method in vars(base).values():
            code = getattr(inspect.unwrap(method) if callable(method) else None, "__code__", None)
            if code is not None:
                yield code.co_names
