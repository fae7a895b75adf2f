"""What vLLM hands to its Triton experts: whether our kernels may run for it, and with what.

`TritonExperts.apply` is the narrowest place of 0.20 to 0.33 that sees topk_ids before the sort. Weights of 16 bits
alone: others come to it with activations that are quantized already. Its subclasses are left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from sglang_moe_ext.core import ActivationDtype, EngineError, MoEShape, Quantization, TileConfig
from sglang_moe_ext.engines import few_tokens_layer
from sglang_moe_ext.engines.tensors import LayerTensors
from sglang_moe_ext.few_tokens_config import FewTokensConfig
from sglang_moe_ext.kernel_plans import MOST_SORTED_EXPERTS, KernelPlan, Plan

if TYPE_CHECKING:
    import torch

    from sglang_moe_ext.engines.tensors import GemmTensors

CLASS, METHOD = "TritonExperts", "apply"
MODULE = "vllm.model_executor.layers.fused_moe.experts.triton_moe"
"""Where the class lies since 0.25; before, in the layer's own module."""
_PLACES = ((MODULE, CLASS), ("vllm.model_executor.layers.fused_moe.fused_moe", CLASS))
PARAMETERS = (
    "self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts",
    "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_tokens_meta",
    "apply_router_weight_on_input",
)  # fmt: skip
Arguments = Mapping[str, Any]
_NOT_QUANTIZED = Quantization()


@dataclass(frozen=True, slots=True)
class ExpertsGate:
    """A reason why the engine's own kernels run. `refuses`: experts, and the arguments of `apply` by name."""

    why: str
    refuses: Callable[[Any, Arguments], bool]


def _place(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__name__


def _any_of(experts: Any, part: str, *names: str) -> bool:
    owner = getattr(experts, part, None)
    return any(getattr(owner, name, None) is not None for name in names)


def _hooks_the_sum(experts: Any, given: Arguments) -> bool:
    uses = getattr(experts, "_uses_post_gemm2_hook", None)
    return uses is not None and bool(uses(given["hidden_states"].shape[0]))


def _is_quantized(experts: Any, given: Arguments) -> bool:
    scales = given["a1q_scale"] is not None or given["a2_scale"] is not None
    return scales or experts.quant_config.quant_dtype is not None or _any_of(experts, "quant_config", "w1_scale")


def _lies_otherwise(experts: Any, given: Arguments) -> bool:
    names = ("output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids")
    hidden, output, w1, w2 = (given[name] for name in ("hidden_states", "output", "w1", "w2"))
    return (
        not all(given[name].is_contiguous() for name in names)
        or w1.shape[1] != 2 * w2.shape[2]
        or output.shape != hidden.shape
        or not w1.device == w2.device == hidden.device
    )


def _has_other_types(experts: Any, given: Arguments) -> bool:
    import torch

    dtype = given["hidden_states"].dtype
    others = {given[name].dtype for name in ("output", "w1", "w2")}
    return dtype not in (torch.bfloat16, torch.float16) or others != {dtype}


GATES = (
    ExpertsGate("its experts are a kind of their own", lambda experts, given: _place(type(experts)) not in _PLACES),
    ExpertsGate(
        "its activation is not SwiGLU",
        lambda experts, given: getattr(given["activation"], "value", given["activation"]) != "silu",
    ),
    ExpertsGate(
        "its SwiGLU has limits",
        lambda experts, given: (
            _any_of(experts, "quant_config", "gemm1_clamp_limit", "gemm1_alpha", "gemm1_beta")
            or _any_of(experts, "activation_config", "clamp_limit")
        ),
    ),
    ExpertsGate("its weights or activations are quantized", _is_quantized),
    ExpertsGate("it has biases", lambda experts, given: _any_of(experts, "quant_config", "w1_bias", "w2_bias")),
    ExpertsGate("some experts are on other ranks", lambda experts, given: given["expert_map"] is not None),
    ExpertsGate("its tokens come from other ranks", lambda experts, given: given["expert_tokens_meta"] is not None),
    ExpertsGate(
        "it weighs the input of the experts", lambda experts, given: bool(given["apply_router_weight_on_input"])
    ),
    ExpertsGate(
        "LoRA adapters look between its kernels",
        lambda experts, given: getattr(experts, "_lora_context", None) is not None,
    ),
    ExpertsGate("its sum is somebody else's", _hooks_the_sum),
    ExpertsGate("it multiplies other types", _has_other_types),
    ExpertsGate("its tensors lie otherwise", _lies_otherwise),
)


def check(apply: Callable[..., Any]) -> None:
    """Raises EngineError where the method takes other arguments than those that are known."""
    found = tuple(inspect.signature(apply).parameters)
    if found != PARAMETERS:
        raise EngineError(f"{CLASS}.{METHOD} takes other arguments: {', '.join(found)}")


def given(args: tuple[Any, ...], kwargs: Arguments) -> dict[str, Any]:
    """The arguments by name, the experts left out."""
    return {**dict(zip(PARAMETERS[1:], args, strict=False)), **kwargs}


def refusal(experts: Any, arguments: Arguments) -> ExpertsGate | None:
    """Why our kernels may not run for them."""
    return next((gate for gate in GATES if gate.refuses(experts, arguments)), None)


def can_run(plan: Plan, experts: int) -> bool:
    """Whether a plan asks for nothing of the engine: neither its sort nor its up GEMM."""
    return isinstance(plan, FewTokensConfig) or (not isinstance(plan.up, TileConfig) and experts <= MOST_SORTED_EXPERTS)


def run(arguments: Arguments, plan: Plan) -> None:
    """Write the output, which may be the hidden states."""
    _run(_tensors(arguments), plan, arguments["output"])


_LOADING_TOKENS = (16, 3)
"""Divisible by 16 and not: compilers make binaries of their own for whole numbers of 16. Few, for little memory."""


def load_kernels(arguments: Arguments, plan: Plan) -> None:
    """Compile and load what the plan launches for this layer, by running it on batches of zeros."""
    if isinstance(plan, FewTokensConfig):
        few_tokens_layer.load(_tensors(arguments), _NOT_QUANTIZED, plan)
        return
    for tokens in _LOADING_TOKENS:
        batch = few_tokens_layer.zeros(_tensors(arguments), tokens)
        _run(batch, plan, batch.hidden.new_empty(batch.hidden.shape))


def _run(tensors: LayerTensors, plan: Plan, out: torch.Tensor) -> None:
    if isinstance(plan, KernelPlan):
        from sglang_moe_ext.engines import sorted_layer

        sorted_layer.run(sorted_layer.sort(NoHost(), _shape(tensors), tensors, plan), out)
        return
    few_tokens_layer.run(tensors, _NOT_QUANTIZED, plan, out)


class NoHost:
    """In the place of the engine in a layer of which our kernels do all."""

    def align(self, topk_ids: torch.Tensor, block_m: int, experts: int) -> NoReturn:
        """Raises EngineError: our kernels do not read vLLM's sort."""
        raise EngineError(f"{experts} experts are too many for our sort, and our kernels do not read vLLM's")

    def launch_sorted_up(self, shape: MoEShape, tensors: GemmTensors, config: TileConfig) -> NoReturn:
        """Raises EngineError: vLLM's up GEMM writes each row to its pair."""
        raise EngineError(f"vLLM's up GEMM writes no rows in the order of the experts: {config}")


def _shape(tensors: LayerTensors) -> MoEShape:
    import torch

    dtype: ActivationDtype = "bfloat16" if tensors.hidden.dtype == torch.bfloat16 else "float16"
    experts, hidden_size, intermediate_size = tensors.w2.shape
    return MoEShape(experts, intermediate_size, hidden_size, tensors.topk_ids.shape[1], _NOT_QUANTIZED, dtype=dtype)


def _tensors(arguments: Arguments) -> LayerTensors:
    hidden, w1, w2, weights, ids = (
        arguments[name] for name in ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")
    )
    return LayerTensors(hidden, w1, w2, None, None, weights, ids)
