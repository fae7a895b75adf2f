"""Where `--moe-backend auto` of vLLM takes another backend than Triton, which alone reads a table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sglang_moe_ext import env
from sglang_moe_ext.core import Gpu, MoEShape, Quantization
from sglang_moe_ext.engines.backend_answer import AskedBackend
from sglang_moe_ext.engines.vllm.hook_points import GROUPS_RUN_TRITON, LOOKUP
from sglang_moe_ext.engines.weight_only import is_weight_only, marlin_takes

Version = tuple[int, int, int]

_AMPERE, _HOPPER, _BLACKWELL, _SMALL_BLACKWELL = (80, 86, 87), (90,), (100, 103), (120, 121)


@dataclass(frozen=True, slots=True)
class OtherVllmBackend:
    """Where `--moe-backend auto` takes, or may take, another backend. Read in the oracles of vLLM 0.33.0."""

    backend: str
    applies: Callable[[MoEShape, Gpu], bool]


def _is_block_wise_fp8(shape: MoEShape) -> bool:
    """In blocks as the checkpoint has them: refined ones are read by Triton alone (vLLM 0.33, oracle/fp8.py)."""
    return shape.quantization.scheme == "fp8_w8a8" and shape.quantization.block_shape == (128, 128)


def _is_fp8_by_channel(shape: MoEShape) -> bool:
    return shape.quantization.scheme == "fp8_w8a8" and shape.quantization.per_channel


_OTHERS = (
    OtherVllmBackend("Marlin", lambda shape, gpu: shape.quantization.scheme == "fp8_w8a8" and gpu.sm in _AMPERE),
    OtherVllmBackend("FlashInfer", lambda shape, gpu: shape.quantization.scheme is None and gpu.sm in _BLACKWELL),
    OtherVllmBackend("FlashInfer", lambda shape, gpu: shape.quantization.scheme is None and gpu.sm in _SMALL_BLACKWELL),
    OtherVllmBackend("FlashInfer or DeepGEMM", lambda shape, gpu: _is_block_wise_fp8(shape) and gpu.sm in _BLACKWELL),
    OtherVllmBackend("DeepGEMM", lambda shape, gpu: _is_block_wise_fp8(shape) and gpu.sm in _SMALL_BLACKWELL),
    OtherVllmBackend("FlashInfer", lambda shape, gpu: _is_block_wise_fp8(shape) and gpu.sm in _HOPPER and shape.ep > 1),
    OtherVllmBackend("CUTLASS", lambda shape, gpu: _is_fp8_by_channel(shape) and gpu.sm in (*_HOPPER, *_BLACKWELL)),
)


NEWEST: Version = (0, 33, 0)
"""The newest release whose choice of a backend was read."""
_FIRST_WITH_PADDED_MARLIN: Version = (0, 25, 0)
_AS_READ = "as read in vLLM 0.20, 0.25 and 0.33, not asked of the engine"


def why_no_table(
    shape: MoEShape, gpu: Gpu, architecture: str, version: Version = NEWEST, asked: AskedBackend | None = None
) -> str | None:
    """Why a server does not, or may not, read a table for the layer; None: it does.

    `asked`: what the engine itself said, where it was asked.
    """
    found = _why(shape, gpu, architecture, version)
    if asked is None:
        return None if found is None else f"{found} ({_AS_READ})"
    if asked.reads_tables:
        return None
    advice = f": {_advise(shape, version)}"
    release = ".".join(map(str, version))
    return f"it runs {asked.name}, which reads no table{advice} (asked vLLM {release}: {asked.method})"


def _advise(shape: MoEShape, version: Version) -> str:
    stored = shape.quantization.checkpoint
    if not is_weight_only(shape.quantization):
        return "--moe-backend triton asks for Triton"
    if stored is not None and stored.method == "compressed_tensors":
        return "--moe-backend triton asks for Triton" if version >= GROUPS_RUN_TRITON else "the server's log names it"
    if stored is not None and stored.method not in ("awq", "gptq"):
        return "the server's log names it"
    return "--quantization moe_wna16 makes an AWQ or GPTQ checkpoint run Triton"


def _why(shape: MoEShape, gpu: Gpu, architecture: str, version: Version) -> str | None:
    if architecture == "GptOssForCausalLM":
        return "gpt-oss in mxfp4 runs on backends that read no table (the server's log names its choice)"
    if gpu.target.is_amd:
        if not env.is_on(env.VLLM_AITER):
            return None
        return (
            f"{env.VLLM_AITER} is on here, with which AITER runs the experts and reads no table: --moe-backend triton "
            "asks for Triton"
        )
    if is_weight_only(shape.quantization):
        return _why_weight_only(shape, version)
    found = next((other for other in _OTHERS if other.applies(shape, gpu)), None)
    if found is None:
        return None
    return (
        f"vLLM takes {found.backend} for such a layer on this GPU, which reads no table: --moe-backend triton makes "
        "sure that it does (the server's log names its choice)"
    )


def _why_weight_only(shape: MoEShape, version: Version) -> str | None:
    """Marlin takes such weights wherever it can; `moe_wna16` is Triton's."""
    stored = shape.quantization.checkpoint
    method = None if stored is None else stored.method
    if method == "moe_wna16" or not marlin_takes(shape, pads_columns=_pads_columns(shape.quantization, version)):
        return None
    bits = shape.quantization.weight_bits
    return f"vLLM takes Marlin for weights of {bits} bits, which reads no table: {_advise(shape, version)}"


def _pads_columns(quantization: Quantization, version: Version) -> bool:
    """Whether weights are padded to Marlin's tiles: AutoRound's are not, nor were those in an order of their own."""
    stored = quantization.checkpoint
    if version < _FIRST_WITH_PADDED_MARLIN or stored is None:
        return version >= _FIRST_WITH_PADDED_MARLIN
    keeps_order = version >= GROUPS_RUN_TRITON or not stored.activation_order
    return stored.method != "auto_round" and keeps_order


_PARTS = ("experts", "fallback_experts")
"""Of experts that choose between two others at each call."""


def read_tables(experts: object) -> bool:
    """True where a method of these experts, or of the experts that they choose from, names the lookup.

    A method that a subclass replaces counts as well: an unused table is better than a useful one called useless.
    """
    parts = [experts, *(part for name in _PARTS if (part := getattr(experts, name, None)) is not None)]
    return any(LOOKUP in names for part in parts for names in _names(type(part)))


def _names(kind: type) -> Iterator[tuple[str, ...]]:
    for base in kind.__mro__:
        for method in vars(base).values():
            code = getattr(inspect.unwrap(method) if callable(method) else None, "__code__", None)
            if code is not None:
                yield code.co_names
