"""Child of test_own_path: the SGLang on PYTHONPATH runs whole layers, hooked, with tables that choose our path.

stdin: {"device": name}. Last line of stdout: what `main` returns. All kernels run in Triton's interpreter; the sort of
the tokens and the quantization of the engine's up GEMM, CUDA operators, are the reference's. The launchers of the
warp-specialized kernels are replaced. Buffers that are made empty hold NaN, or numbers of rows that are there.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sglang_moe_ext.core import MoEShape, Quantization
from sglang_moe_ext.engines import running_engine
from sglang_moe_ext.engines.sglang import bootstrap, hook_points, installation, kernel_sequence
from sglang_moe_ext.engines.sglang.kernel_sequence import _TAKEN, GATES
from sglang_moe_ext.kernels import reference
from sglang_moe_ext.kernels.quantize import quantize_weights
from sglang_moe_ext.serving import attach, guard, plugin
from sglang_moe_ext.tuning.bench.nan_fill import NanFill
from tests.engines.children import warp_specialized_stand_in
from tests.engines.children.dtypes import our_quantizer
from tests.kernels.interpreter import repair

SHAPES = {
    "16 bits": MoEShape(6, 128, 128, 2),
    "block": MoEShape(6, 128, 256, 2, Quantization("fp8_w8a8", (128, 128))),
    "elsewhere": MoEShape(5, 128, 128, 2),
    "channel": MoEShape(6, 128, 128, 2, Quantization("fp8_w8a8", per_channel=True)),
    "warp-specialized 16 bits": MoEShape(7, 128, 128, 2),
    "warp-specialized block": MoEShape(7, 256, 128, 2, Quantization("fp8_w8a8", (128, 128))),
    "warp-specialized channel": MoEShape(7, 128, 128, 2, Quantization("fp8_w8a8", per_channel=True)),
    "warp-specialized up alone": MoEShape(7, 384, 128, 2, Quantization("fp8_w8a8", (128, 128))),
    "warp-specialized down alone": MoEShape(8, 128, 128, 2),
    "few 16 bits": MoEShape(9, 128, 128, 2),
    "few block": MoEShape(9, 128, 256, 2, Quantization("fp8_w8a8", (128, 128))),
    "few channel": MoEShape(9, 128, 128, 2, Quantization("fp8_w8a8", per_channel=True)),
}
TOKENS = 33
"""At which the tables choose our path; at fewer they do not."""
FEW_TOKENS = 3
"""At which the tables choose the two launches, where they do."""


SORTS: list[tuple[int, int]] = []
"""Of each sort of the engine: tokens, and rows of a block."""


def sort(ids: torch.Tensor, block: int, experts: int) -> tuple[torch.Tensor, ...]:
    """In the place of the engine's."""
    SORTS.append((ids.shape[0], block))
    return tuple(reference.moe_align(ids, block, experts))


class Counted:
    """In the place of our last kernel's launcher: what ran to the end of our path; `loads`: before it was needed."""

    def __init__(self) -> None:
        from sglang_moe_ext.kernels import gather_sum

        self.runs, self.loads, self._launch = 0, 0, gather_sum.launch_gather_sum
        gather_sum.launch_gather_sum = self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        is_load = args[3].shape[0] in kernel_sequence._LOADING_TOKENS
        self.loads, self.runs = self.loads + is_load, self.runs + (not is_load)
        self._launch(*args, **kwargs)


class CountedFew:
    """In the place of the two launches for few tokens: how often both ran, for a batch and to load them."""

    def __init__(self) -> None:
        from sglang_moe_ext.kernels import few_tokens

        self.runs, self.loads, self._layer, self._load = 0, 0, few_tokens.few_tokens_layer, kernel_sequence.load_kernels
        few_tokens.few_tokens_layer, kernel_sequence.load_kernels = self, self.load

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._layer(*args, **kwargs)
        self.runs += 1

    def load(self, *args: Any) -> None:
        runs = self.runs
        self._load(*args)
        self.runs, self.loads = runs, self.loads + self.runs - runs


class RowFill(TorchFunctionMode):
    """Within, empty int32 tensors hold the number of a row that is there, as those of an allocator may."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like) and made.dtype == torch.int32:
            made.fill_(1)
        return made


def align_without_others(ids: torch.Tensor, block: int, experts: int) -> tuple[torch.Tensor, ...]:
    """A sort that leaves the pairs of other ranks' experts out, as some of the engine's do."""
    aligned = reference.moe_align(ids, block, experts)
    used = aligned.expert_ids[: int(aligned.num_tokens_post_padded[0]) // block]
    left_out = int((used < 0).sum())
    return (
        aligned.sorted_token_ids.roll(-left_out * block),
        aligned.expert_ids.roll(-left_out),
        aligned.num_tokens_post_padded - left_out * block,
    )


class Problem:
    """Inputs of one layer, and what float32 makes of them."""

    def __init__(
        self, shape: MoEShape, tokens: int = TOKENS, *, ids_elsewhere: bool = False, quantizes_activations: bool = True
    ) -> None:
        torch.manual_seed(0)
        self.quantizes_activations = quantizes_activations
        self.shape = shape
        self.hidden = torch.randn(tokens, shape.hidden_size, dtype=torch.bfloat16)
        self.topk_ids = torch.rand(tokens, shape.experts).topk(shape.top_k, dim=1).indices.int()
        if ids_elsewhere:
            self.topk_ids[::3, 0] = -1
        self.topk_weights = torch.rand(tokens, shape.top_k)
        scheme = shape.quantization
        stored = [torch.randn(shape.experts, *shape.gemm(it), dtype=torch.bfloat16) / 8 for it in ("up", "down")]
        scaled = [quantize_weights(it, scheme) if scheme.scheme else (it, None) for it in stored]
        (self.w1, self.w1_scale), (self.w2, self.w2_scale) = scaled

    def run(self, layer: ModuleType, **changed: Any) -> torch.Tensor:
        """The engine's function for a whole layer; the hidden states are copied, since it may work in place."""
        is_scaled = self.shape.quantization.scheme is not None
        named = {
            "use_fp8_w8a8": is_scaled,
            "w1_scale": self.w1_scale,
            "w2_scale": self.w2_scale,
            "block_shape": None if (block := self.shape.quantization.block_shape) is None else list(block),
            "per_channel_quant": self.shape.quantization.per_channel,
            "filter_expert": False,
        }
        hidden = self.hidden.clone()
        out: torch.Tensor = layer.fused_experts_impl(
            hidden, self.w1, self.w2, self.topk_weights, self.topk_ids, **named | changed
        )
        assert (out.data_ptr() == hidden.data_ptr()) == bool(changed.get("inplace"))
        return out

    def error(self, out: torch.Tensor, factor: float = 1.0) -> float:
        expected = reference.moe_layer(
            self.hidden, self.w1, self.w2, self.topk_weights, self.topk_ids,
            quantization=self.shape.quantization, w1_scale=self.w1_scale, w2_scale=self.w2_scale,
            activation="silu", gated=True, quantizes_activations=self.quantizes_activations,
        )  # fmt: skip
        return reference.relative_error(out, expected * factor)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    yield
    setattr(module, name, before)


def refused(layer: ModuleType, engine: hook_points.SglangHookPoints, given: dict[str, Any]) -> dict[str, bool]:
    """For each argument of this release that our path does not take: whether it refuses a value that is not usual."""
    parameters = kernel_sequence.parameters(getattr(layer, hook_points.SEQUENCE).__wrapped__)
    named = {name for gate in GATES for name in gate.names}
    return {
        name: kernel_sequence.refusal(parameters, {**given, name: unusual(given[name])}, engine) is not None
        for name in parameters.names
        if name not in _TAKEN and (name in named or name in parameters.unknown)
    }


def unusual(value: Any) -> Any:
    return not value if isinstance(value, bool) else "unusual"


def recorded_arguments(layer: ModuleType, run: Callable[[], object]) -> dict[str, Any]:
    """What the engine hands to its sequence of kernels in that run."""
    found: dict[str, Any] = {}
    ours = getattr(layer, hook_points.SEQUENCE)
    parameters = kernel_sequence.parameters(ours.__wrapped__)

    def note(*args: Any, **kwargs: Any) -> Any:
        found.update(parameters.given(args, kwargs))
        return ours(*args, **kwargs)

    with replaced(layer, hook_points.SEQUENCE, note):
        run()
    return found


def few_tokens(
    layer: ModuleType, counted: CountedFew, captured: list[bool], traced: list[bool], handler: Lines
) -> dict[str, Any]:
    """What became of batches that the tables name the two launches for: `sorts`, the engine's; `ours`, both of ours."""
    said: dict[str, Any] = {}

    def ran(what: str, of: Problem, factor: float = 1.0, **changed: Any) -> torch.Tensor:
        runs, loads = counted.runs, counted.loads
        SORTS.clear()
        with NanFill(), RowFill():
            out = of.run(layer, **changed)
        ours, loaded = counted.runs - runs, counted.loads - loads
        said[what] = {"ours": ours, "loads": loaded, "sorts": len(SORTS), "error": of.error(out, factor)}
        return out

    def batch(shape: str, tokens: int = FEW_TOKENS, *, ids_elsewhere: bool = False, ours: bool = True) -> Problem:
        return Problem(SHAPES[shape], tokens, ids_elsewhere=ids_elsewhere, quantizes_activations=not ours)

    problem = batch("few 16 bits")
    captured.append(True)
    ran("captured while cold", problem)
    captured.clear()
    ran("more tokens", batch("few 16 bits", 11))
    ran("out of place", problem)
    captured.append(True)
    ran("captured", problem)
    captured.clear()
    ran("in place", problem, inplace=True)
    ran("scaled", problem, 2.5, routed_scaling_factor=2.5)
    ran("one token", batch("few 16 bits", 1))
    ran("experts elsewhere", batch("few 16 bits", ids_elsewhere=True), filter_expert=True)
    ran("block", batch("few block"))
    ran("channel", batch("few channel"))
    traced.append(True)
    ran("traced", problem)
    traced.clear()
    ran("refused", problem, apply_router_weight_on_input=True)
    ran("refused for good", problem)
    handler.lines.clear()
    from sglang_moe_ext.kernels import few_tokens as kernels

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such launch")

    stock = batch("few block", ours=False)
    with replaced(kernels, "few_tokens_down", fails):
        ran("failing", stock, inplace=True)
    ran("after a failure", stock)
    said["lines"] = list(handler.lines)
    return said


def without_ranks(layer: ModuleType) -> None:
    """Since 0.5.18 the layer asks for the ranks of a server, of which this process has not one."""
    vars(layer).update(
        use_symmetric_memory=lambda *_, **__: nullcontext(),
        get_tp_group=lambda: None,
        get_parallel=lambda: SimpleNamespace(tp_group=None),
    )


def main(request: dict[str, Any]) -> dict[str, Any]:
    repair()
    warp_specialized_stand_in.put_in_place()
    found = installation.find()
    assert found is not None
    layer = bootstrap.import_engine(found.layer_module)
    config = importlib.import_module(found.config_module)
    bootstrap.publish_server_args()
    without_ranks(layer)
    config.get_device_name = lambda *_: request["device"]
    layer.moe_align_block_size = sort
    handler = Lines()
    logging.getLogger("sglang_moe_ext").addHandler(handler)
    problem = Problem(SHAPES["16 bits"])
    stock = problem.run(layer)
    engine = hook_points.locate(layer)
    traced: list[bool] = []
    captured: list[bool] = []
    with (
        replaced(torch.compiler, "is_compiling", lambda: bool(traced)),
        replaced(running_engine, "is_capturing", lambda: lambda: bool(captured)),
    ):
        plugin.attach_patched()
    counted, counted_few = Counted(), CountedFew()
    said: dict[str, Any] = {"active": attach.state().is_active, "stock_error": problem.error(stock)}

    def ran(what: str, of: Problem, factor: float = 1.0, **changed: Any) -> torch.Tensor:
        runs, loads = counted.runs, counted.loads
        with NanFill(), RowFill():
            out = of.run(layer, **changed)
        said[what] = {"ours": counted.runs - runs, "loads": counted.loads - loads, "error": of.error(out, factor)}
        return out

    few = Problem(SHAPES["16 bits"], TOKENS // 3)
    captured.append(True)
    ran("captured while cold", problem)
    captured.clear()
    ran("few tokens", few)
    ran("out of place", problem)
    captured.append(True)
    ran("captured", problem)
    captured.clear()
    ran("in place", problem, inplace=True)
    ran("scaled", problem, 2.5, routed_scaling_factor=2.5)
    ran("block", Problem(SHAPES["block"]))
    with our_quantizer(sys.modules[found.kernel_module], SHAPES["channel"].quantization):
        ran("channel", Problem(SHAPES["channel"]))
    for name, shape in SHAPES.items():
        if name.startswith("warp-specialized"):
            ran(name, Problem(shape))
            ran(f"{name}, experts elsewhere", Problem(shape, ids_elsewhere=True), filter_expert=True)
    said["launched"] = list(warp_specialized_stand_in.calls)
    elsewhere = Problem(SHAPES["elsewhere"], ids_elsewhere=True)
    ran("experts elsewhere", elsewhere, filter_expert=True)
    with replaced(layer, "moe_align_block_size", align_without_others):
        ran("experts left out", elsewhere, filter_expert=True)
    given = recorded_arguments(layer, lambda: problem.run(layer))
    said["refused"] = refused(layer, engine, given)
    said["taken"] = kernel_sequence.refusal(kernel_sequence.parameters(engine.sequence), given, engine) is None
    traced.append(True)
    ran("traced", problem)
    traced.clear()
    said["few"] = few_tokens(layer, counted_few, captured, traced, handler)

    handler.lines.clear()
    from sglang_moe_ext.kernels import sorted_down

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such instruction")

    with replaced(sorted_down, "launch_down", fails):
        out = ran("failing", problem, inplace=True)
    said["failing"]["like stock"] = problem.error(out) == said["stock_error"]
    ran("after a failure", problem)
    said["lines"] = list(handler.lines)
    guard.warn_once.cache_clear()
    return said


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
