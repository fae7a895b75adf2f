"""What SGLang hands to the kernels of a layer behind the sort: whether our kernels may run for it, and with what.

The arguments of `_fused_moe_kernel_sequence` grow with the releases. One that is not known here must be what it is when
it is not given; else the engine's own kernels run.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_moe_ext.core import ActivationDtype, EngineError, MoEShape, Quantization
from sglang_moe_ext.engines import few_tokens_layer
from sglang_moe_ext.engines.config_dict import ConfigWithPlan
from sglang_moe_ext.engines.sglang.deferred_sort import DeferredSort, sort_now
from sglang_moe_ext.engines.sglang.hook_points import SEQUENCE, SglangHookPoints
from sglang_moe_ext.engines.tensors import LayerTensors
from sglang_moe_ext.few_tokens_config import FewTokensConfig
from sglang_moe_ext.kernel_plans import SCALE_GROUP, KernelPlan, Plan

if TYPE_CHECKING:
    import torch

    from sglang_moe_ext.engines.sorted_layer import SortedLayer

FIRST_RELEASE = (0, 5, 11)
"""The first with a function of all kernels behind the sort."""
DOWN_POSITION = 9
"""Of `down_config`, the entry that carries our kernel plan, in all releases from 0.5.11 to 0.5.23."""
_DOWN = "down_config"
_SORTED = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")
_BY_POSITION = (
    "hidden_states", "w1", "w2", "topk_weights", "topk_ids",
    *_SORTED, "config", _DOWN,
)  # fmt: skip
_TAKEN = frozenset(_BY_POSITION) | {
    "w1_scale", "w2_scale", "block_shape", "use_fp8_w8a8", "per_channel_quant",
    "inplace", "routed_scaling_factor", "filter_expert",
    # Of the engine's own configurations.
    "down_moe_use_tma", "up_moe_use_tma",
    # Of gemm1_alpha alone, which is refused.
    "gate_up_interleaved",
}  # fmt: skip
_NEEDED = {
    "activation", "is_gated", "w1_scale", "w2_scale", "block_shape", "use_fp8_w8a8", "per_channel_quant",
    "inplace", "routed_scaling_factor", "filter_expert",
}  # fmt: skip
_FP8_BLOCK = [SCALE_GROUP, SCALE_GROUP]
_NOT_QUANTIZED = Quantization()
_OF_BLOCKS = Quantization("fp8_w8a8", (SCALE_GROUP, SCALE_GROUP))
_OF_CHANNELS = Quantization("fp8_w8a8", None, per_channel=True)
_SYMMETRIC_MEMORY = "sglang.srt.distributed.device_communicators.pynccl_allocator"
_NOTHING = object()
_SOME_RANKS = 2
"""In place of the number of ranks that hold experts, which the call does not tell: launches ask only if it is one."""

Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ArgumentGate:
    """A reason why the engine's own kernels run, for this layer's next batches as well."""

    why: str
    refuses: Callable[[Arguments], bool]
    names: tuple[str, ...] = ()


def _is_scaled_as_known(given: Arguments) -> bool:
    if given["per_channel_quant"]:
        return given["block_shape"] is None
    return list(given["block_shape"] or ()) == _FP8_BLOCK


def _any_given(*names: str) -> Callable[[Arguments], bool]:
    return lambda given: any(given.get(name) is not None for name in names)


def _any_set(*names: str) -> Callable[[Arguments], bool]:
    return lambda given: any(given.get(name) for name in names)


def _unless_given(why: str, *names: str) -> ArgumentGate:
    return ArgumentGate(why, _any_given(*names), names)


def _unless_set(why: str, *names: str) -> ArgumentGate:
    return ArgumentGate(why, _any_set(*names), names)


GATES = (
    ArgumentGate(
        "its activation is not SwiGLU",
        lambda given: given["activation"] != "silu" or not given["is_gated"],
        ("activation", "is_gated"),
    ),
    _unless_given("its SwiGLU has limits", "gemm1_alpha", "gemm1_limit", "swiglu_limit"),
    _unless_set("its gate and up alternate", "fuse_swiglu_interleaved"),
    _unless_given("it has biases", "b1", "b2"),
    _unless_set("its weights are integers", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16"),
    _unless_given("its weights have zero points", "w1_zp", "w2_zp"),
    ArgumentGate(
        "its scales are not those of float8 blocks of 128, or of channels",
        lambda given: bool(given["use_fp8_w8a8"]) and not _is_scaled_as_known(given),
    ),
    _unless_given("its activations come quantized", "a1_scale", "a2_scale", "a1_q"),
    _unless_set("it weighs the input of the experts", "apply_router_weight_on_input"),
    _unless_set("its sum is somebody else's", "no_combine", "no_combine_keep_router_weight", "defer_sum"),
    _unless_given("LoRA adapters look between its kernels", "hooks"),
)
_KNOWN = _TAKEN.union(*(gate.names for gate in GATES))


@dataclass(frozen=True, slots=True)
class SequenceParameters:
    """Of one release: names in order, what is meant where one is not given, and the names that are not known here."""

    names: tuple[str, ...]
    defaults: Arguments
    unknown: tuple[str, ...]

    def given(self, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
        """All arguments by name, of a call that the engine can make."""
        return {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}


def parameters(function: Callable[..., Any]) -> SequenceParameters:
    """Those of this release's function, where it takes what our kernels need in the order that is known.

    Raises:
        EngineError: it does not.
    """
    found = inspect.signature(function).parameters
    names = tuple(found)
    missing = _NEEDED - found.keys()
    if names[: len(_BY_POSITION)] != _BY_POSITION or missing:
        raise EngineError(f"{SEQUENCE} takes other arguments: {', '.join(names)}")
    defaults = {name: it.default for name, it in found.items() if it.default is not inspect.Parameter.empty}
    return SequenceParameters(names, defaults, tuple(name for name in names if name not in _KNOWN))


def plan_of(args: tuple[Any, ...], kwargs: Arguments) -> Plan | None:
    """The kernel plan that our lookup chose for this call, if it did."""
    entry = args[DOWN_POSITION] if len(args) > DOWN_POSITION else kwargs.get(_DOWN)
    return entry.plan if isinstance(entry, ConfigWithPlan) else None


def refusal(of: SequenceParameters, given: Arguments, engine: SglangHookPoints) -> ArgumentGate | None:
    """Why our kernels may not run for these arguments, defaults included.

    Raises:
        EngineError: this engine says of a setting in a way that is not known.
    """
    for name in of.unknown:
        if given[name] is not of.defaults.get(name, _NOTHING):
            return ArgumentGate(f"what {name} asks for is not known here", bool)
    for gate in GATES:
        if gate.refuses(given):
            return gate
    if engine.sums_in_the_down_gemm():
        return ArgumentGate("the server sums in the down GEMM", bool)
    if not given["inplace"] and _allocates_for_all_ranks(engine):
        return ArgumentGate("its result is allocated for all ranks", bool)
    return _of_tensors(given)


def _allocates_for_all_ranks(engine: SglangHookPoints) -> bool:
    """Whether results lie in memory that NCCL shares, which the layers of 0.5.18 and newer allocate for it."""
    if not hasattr(engine.layer, "use_symmetric_memory"):
        return False
    is_enabled = getattr(sys.modules.get(_SYMMETRIC_MEMORY), "is_symmetric_memory_enabled", None)
    return is_enabled is None or bool(is_enabled())


def _of_tensors(given: Arguments) -> ArgumentGate | None:
    import torch

    hidden, w1, w2 = given["hidden_states"], given["w1"], given["w2"]
    if given["use_fp8_w8a8"]:
        scales = given["w1_scale"], given["w2_scale"]
        if any(scale is None or scale.dtype != torch.float32 for scale in scales):
            return ArgumentGate("its scales are not float32", bool)
        if hidden.shape[1] % _FP8_BLOCK[1] or w2.shape[2] % _FP8_BLOCK[1]:
            return ArgumentGate("its columns are no whole groups of 128", bool)
        wanted = torch.float8_e4m3fn
    else:
        wanted = hidden.dtype
    if hidden.dtype not in (torch.bfloat16, torch.float16) or {w1.dtype, w2.dtype} != {wanted}:
        return ArgumentGate(f"it multiplies {hidden.dtype} by {w1.dtype} and {w2.dtype}", bool)
    if w2.shape[2] * 2 != w1.shape[1] or not (w1.is_contiguous() and w2.is_contiguous() and hidden.is_contiguous()):
        return ArgumentGate("its weights are padded, or lie otherwise", bool)
    return None


def run(given: Arguments, plan: Plan, engine: SglangHookPoints) -> torch.Tensor:
    """What the sequence returns: [tokens, hidden], the hidden states themselves where it works in place."""
    import torch

    hidden = given["hidden_states"]
    factor = 1.0 if given["routed_scaling_factor"] is None else float(given["routed_scaling_factor"])
    out: torch.Tensor = hidden if given["inplace"] else torch.empty_like(hidden)
    if isinstance(plan, FewTokensConfig):
        few_tokens_layer.run(_tensors(given), _quantization(given), plan, out, factor)
        return out
    from sglang_moe_ext.engines import sorted_layer

    engines_sort = tuple(given[name] for name in _SORTED)
    sorted_layer.run(_layer(_shape(given), _tensors(given), plan, engine, engines_sort), out, factor)
    return out


_LOADING_TOKENS = (16, 3)
"""Divisible by 16 and not: compilers make binaries of their own for whole numbers of 16. Few, for little memory."""


def load_kernels(given: Arguments, plan: Plan, engine: SglangHookPoints) -> None:
    """Compile and load what the plan launches for this layer, by running it on batches of zeros."""
    if isinstance(plan, FewTokensConfig):
        few_tokens_layer.load(_tensors(given), _quantization(given), plan)
        return
    import torch

    from sglang_moe_ext.engines import sorted_layer

    for tokens in _LOADING_TOKENS:
        batch = few_tokens_layer.zeros(_tensors(given), tokens)
        sort = functools.partial(engine.layer.moe_align_block_size, batch.topk_ids, plan.block_m, batch.w1.shape[0])
        sorted_layer.run(
            _layer(_shape(given), batch, plan, engine, DeferredSort(sort).parts()), torch.empty_like(batch.hidden)
        )


def _layer(
    shape: MoEShape, tensors: LayerTensors, plan: KernelPlan, engine: SglangHookPoints, engines_sort: tuple[Any, ...]
) -> SortedLayer:
    from sglang_moe_ext.engines import sorted_layer
    from sglang_moe_ext.engines.sglang.runner import LoadedSglang

    loaded = LoadedSglang(engine.engine.version, engine.kernels, None, engine.layer)
    if sorted_layer.can_sort(shape):
        return sorted_layer.sort(loaded, shape, tensors, plan)
    ids, experts, padded = sort_now(engines_sort, {})[0]
    return sorted_layer.take_sorted(loaded, shape, tensors, plan, (ids, experts, padded))


def _shape(given: Arguments) -> MoEShape:
    w1, w2 = given["w1"], given["w2"]
    return MoEShape(
        experts=w1.shape[0],
        intermediate_size=w2.shape[2],
        hidden_size=w2.shape[1],
        top_k=given["topk_ids"].shape[1],
        quantization=_quantization(given),
        dtype=_dtype(given["hidden_states"]),
        ep=_SOME_RANKS if given["filter_expert"] else 1,
    )


def _quantization(given: Arguments) -> Quantization:
    if not given["use_fp8_w8a8"]:
        return _NOT_QUANTIZED
    return _OF_CHANNELS if given["per_channel_quant"] else _OF_BLOCKS


def _tensors(given: Arguments) -> LayerTensors:
    names = ("hidden_states", "w1", "w2", "w1_scale", "w2_scale", "topk_weights", "topk_ids")
    return LayerTensors(*(given[name] for name in names))


def _dtype(hidden: torch.Tensor) -> ActivationDtype:
    import torch

    return "bfloat16" if hidden.dtype == torch.bfloat16 else "float16"
