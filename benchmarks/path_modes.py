"""Our path in SGLang's real layer, hooked as in a server: eager, in place, CUDA graphs, torch.compile, streams, layers.

usage, from the repository root, on a GPU: python -m benchmarks.path_modes [--cases NAME ...] [--layers 130]

Each way of running must give the bits that the eager one gives, and that must be right. One line for each; exit status
1 where one is not so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_moe_ext.core import MoEShape, Quantization
from sglang_moe_ext.few_tokens_config import DownTile, FewTokensConfig, UpTile
from sglang_moe_ext.kernel_plans import (
    DownConfig,
    KernelPlan,
    Plan,
    UpConfig,
    WarpSpecializedDown,
    WarpSpecializedUp,
)

LAYERS, TURNS = 130, 16


@dataclass(frozen=True)
class Case:
    """A layer, a plan for it, the error that it stays under, and batches: of ours and of the engine's own kernels.

    `between`: the numbers of tokens that the table names the plan for.
    """

    shape: MoEShape
    plan: Plan
    bound: float
    tokens: int = 1024
    engines_tokens: int = 511
    between: tuple[int, int] = (512, 4096)


_BLOCK = Quantization("fp8_w8a8", (128, 128))
_CHANNEL = Quantization("fp8_w8a8", per_channel=True)
_FEW: dict[str, Any] = {"tokens": 4, "engines_tokens": 9, "between": (1, 8)}
CASES = {
    "16 bits": Case(
        MoEShape(16, 768, 1024, 4),
        KernelPlan(UpConfig(128, 128, 64, 8, 8, 4), DownConfig(128, 256, 64, 8, 8, 4, half_stores=True)),
        1e-2,
    ),
    "float8 in blocks": Case(
        MoEShape(16, 768, 1024, 4, _BLOCK),
        KernelPlan(
            UpConfig(64, 128, 128, 8, 8, 2, persistent=False), DownConfig(64, 128, 128, 8, 4, 4, programs_per_sm=2)
        ),
        5e-2,
    ),
    "16 bits, warp-specialized": Case(
        MoEShape(17, 768, 1024, 4), KernelPlan(WarpSpecializedUp(2), WarpSpecializedDown("wide", 4)), 1e-2
    ),
    "float8 in blocks, warp-specialized": Case(
        MoEShape(17, 768, 1024, 4, _BLOCK), KernelPlan(WarpSpecializedUp(2), WarpSpecializedDown("pair", 8, 3)), 5e-2
    ),
    "float8 of channels, warp-specialized": Case(
        MoEShape(17, 768, 1024, 4, _CHANNEL),
        KernelPlan(WarpSpecializedUp(1, persistent=False), WarpSpecializedDown("wide", 8)),
        5e-2,
    ),
    "few tokens, 16 bits": Case(
        MoEShape(64, 768, 1024, 4),
        FewTokensConfig(UpTile(1, 8, 512, 4, 3), DownTile(1, 16, 512, 4, 4, prefetched=1)),
        1e-2,
        **_FEW,
    ),
    "few tokens, grouped": Case(
        MoEShape(65, 768, 1024, 4),
        FewTokensConfig(UpTile(16, 32, 128, 4, 5), DownTile(16, 64, 128, 4, 4, split=4), grouped=True),
        1e-2,
        **_FEW,
    ),
    "few tokens, float8 in blocks": Case(
        MoEShape(64, 768, 1024, 4, _BLOCK),
        FewTokensConfig(UpTile(8, 64, 128, 4, 4), DownTile(8, 128, 128, 4, 4, split=4), wide_range=True),
        1e-2,
        **_FEW,
    ),
    "few tokens, float8 of channels": Case(
        MoEShape(64, 768, 1024, 4, _CHANNEL),
        FewTokensConfig(UpTile(8, 16, 128, 2, 5), DownTile(8, 64, 128, 4, 4, split=4), grouped=True, wide_range=True),
        1e-2,
        **_FEW,
    ),
}
"""Of one file name of tables there is one case."""


@dataclass
class Runs:
    """How often a path of ours came to its last kernel."""

    count: int = 0

    def watch(self) -> None:
        from sglang_moe_ext.kernels import few_tokens, gather_sum

        gather_sum.launch_gather_sum = self._counted(gather_sum.launch_gather_sum)
        few_tokens.few_tokens_layer = self._counted(few_tokens.few_tokens_layer)

    def _counted(self, launch: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: Any, **kwargs: Any) -> None:
            launch(*args, **kwargs)
            self.count += 1

        return counted


def hooked(store: Path) -> Any:
    """The engine's layer module, with our hooks and tables that choose our path."""
    from sglang_moe_ext.engines.sglang import runner, table_names
    from sglang_moe_ext.engines.sglang.installation import find
    from sglang_moe_ext.serving import attach, plugin
    from sglang_moe_ext.serving.kernel_selection import SHORTEST_US
    from sglang_moe_ext.tables import plan_table, user_store
    from sglang_moe_ext.tables.provenance import TuningRun

    engine, installed = runner.load(), find()
    assert installed is not None
    assert installed.triton is not None
    runner.alone(engine.layer)
    config = sys.modules[installed.config_module]
    folder = user_store.tables_folder("sglang", table_names.version_folder(installed.triton))
    assert folder.is_relative_to(store)
    for case in CASES.values():
        name = table_names.file_name(table_names.table_key(case.shape, config.get_device_name()))
        run = TuningRun("", "", "", str(case.shape), "", "", None, None, None, None, 0, "")
        entries = {m: plan_table.KernelEntry(case.plan, run, {"us": SHORTEST_US}) for m in case.between}
        plan_table.put(plan_table.path_beside(folder / name), entries)
    plugin.attach_patched()
    assert attach.state().is_active, attach.state().why
    return engine.layer


class Problem:
    """Weights of some layers, and inputs."""

    def __init__(self, case: Case, layers: int) -> None:
        import torch

        from sglang_moe_ext.kernels.quantize import quantize_weights

        self.case, self.shape = case, case.shape
        shape = case.shape
        torch.manual_seed(0)
        self.inputs = [self.batch(case.tokens) for _ in range(2)]
        self.weights = []
        for _ in range(layers):
            stored = [
                torch.randn(shape.experts, *shape.gemm(it), device="cuda", dtype=torch.bfloat16) / 32
                for it in ("up", "down")
            ]
            scheme = shape.quantization
            self.weights.append([quantize_weights(it, scheme) if scheme.scheme else (it, None) for it in stored])

    def batch(self, tokens: int) -> tuple[Any, Any, Any]:
        import torch

        hidden = torch.randn(tokens, self.shape.hidden_size, device="cuda", dtype=torch.bfloat16)
        topk_ids = torch.rand(tokens, self.shape.experts, device="cuda").topk(self.shape.top_k, dim=1).indices.int()
        return hidden, torch.rand(tokens, self.shape.top_k, device="cuda"), topk_ids

    def run(self, operator: Callable[..., Any], batch: tuple[Any, Any, Any], layer: int = 0) -> Any:
        """What the engine's operator makes of a batch; in place it returns nothing."""
        hidden, weights, ids = batch
        (w1, w1_scale), (w2, w2_scale) = self.weights[layer]
        quantization = self.shape.quantization
        return operator(
            hidden, w1, w2, weights, ids, use_fp8_w8a8=w1_scale is not None, w1_scale=w1_scale, w2_scale=w2_scale,
            block_shape=[128, 128] if quantization.block_shape else None, per_channel_quant=quantization.per_channel,
            filter_expert=False,
        )  # fmt: skip

    def error(self, out: Any, batch: tuple[Any, Any, Any], layer: int = 0) -> float:
        from sglang_moe_ext.kernels import reference

        hidden, weights, ids = batch
        (w1, w1_scale), (w2, w2_scale) = self.weights[layer]
        expected = reference.moe_layer(
            hidden, w1, w2, weights, ids, quantization=self.shape.quantization,
            w1_scale=w1_scale, w2_scale=w2_scale, activation="silu", gated=True,
            quantizes_activations=not isinstance(self.case.plan, FewTokensConfig),
        )  # fmt: skip
        return reference.relative_error(out, expected)


def in_place(module: Any, problem: Problem) -> Any:
    hidden, *rest = problem.inputs[0]
    copy = hidden.clone()
    problem.run(module.inplace_fused_experts, (copy, *rest))
    return copy


def graph(module: Any, problem: Problem) -> Any:
    """Captured on one batch, replayed on another that was copied into its place."""
    import torch

    static = tuple(it.clone() for it in problem.inputs[1])
    problem.run(module.outplace_fused_experts, static)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = problem.run(module.outplace_fused_experts, static)
    for place, value in zip(static, problem.inputs[0], strict=True):
        place.copy_(value)
    captured.replay()
    return out


def compiled(module: Any, problem: Problem) -> Any:
    import torch

    def doubled(hidden: Any) -> Any:
        return problem.run(module.outplace_fused_experts, (hidden, *problem.inputs[0][1:])) * 2

    return torch.compile(doubled, fullgraph=True)(problem.inputs[0][0]) / 2


def streams(module: Any, problem: Problem) -> Any:
    """Two at once; the last result whose bits differ from those of the first, or the first."""
    import torch

    torch.cuda.synchronize()
    sides = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
    outs = []
    for _ in range(TURNS):
        for side in sides:
            with torch.cuda.stream(side):
                outs.append(problem.run(module.outplace_fused_experts, problem.inputs[0]))
    torch.cuda.synchronize()
    return next((out for out in reversed(outs) if not torch.equal(out, outs[0])), outs[0])


MODES: dict[str, Callable[[Any, Problem], Any]] = {
    "again": lambda module, problem: problem.run(module.outplace_fused_experts, problem.inputs[0]),
    "in place": in_place,
    "CUDA graph, replayed on other data": graph,
    "torch.compile": compiled,
    f"two streams, {TURNS} times each": streams,
}


def checked(name: str, module: Any, runs: Runs, layers: int) -> bool:
    """Print a line for each mode; whether all are as they must be."""
    import torch

    bound = CASES[name].bound
    problem = Problem(CASES[name], layers)
    before = runs.count
    eager = problem.run(module.outplace_fused_experts, problem.inputs[0])
    error = problem.error(eager, problem.inputs[0])
    is_right = runs.count > before and error < bound
    print(f"{name}: eager: error {error:.2e}: {'right' if is_right else 'WRONG, or not our path'}")
    for mode, run in MODES.items():
        before = runs.count
        out = run(module, problem)
        torch.cuda.synchronize()
        is_same = runs.count > before and torch.equal(out, eager)
        is_right &= is_same
        print(f"{name}: {mode}: {'the same bits' if is_same else 'OTHER BITS, or not our path'}")
    errors = [problem.error(problem.run(module.outplace_fused_experts, problem.inputs[0], at), problem.inputs[0], at)
              for at in range(layers)]  # fmt: skip
    are_right = max(errors) < bound
    print(f"{name}: {layers} layers in turn: errors up to {max(errors):.2e}: {'right' if are_right else 'WRONG'}")
    return is_right and are_right


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all is as it must be, 1 something is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as store:
        os.environ["SGLANG_MOE_EXT_STORE"] = store
        module, runs = hooked(Path(store)), Runs()
        runs.watch()
        results = [checked(name, module, runs, arguments.layers) for name in arguments.cases]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
