"""A child that runs the engine's MoE layer with its real lookup, on a card of the size that it is told."""

from __future__ import annotations

from typing import Any

from benchmarks.serving import attached, small_limit
from benchmarks.serving.answering import answer_all, take_standard_output
from benchmarks.serving.workloads import WORKLOADS
from sglang_moe_ext.core import TileConfig
from sglang_moe_ext.engines.config_dict import tile_of
from sglang_moe_ext.engines.registry import SGLANG
from sglang_moe_ext.engines.sglang import runner
from sglang_moe_ext.engines.sglang.hook_points import LOOKUP
from sglang_moe_ext.engines.sglang.runner import LoadedSglang
from sglang_moe_ext.engines.tensors import LayerTensors
from sglang_moe_ext.tuning.bench import routing
from sglang_moe_ext.tuning.bench.layer import BenchedLayer

_KERNEL = "fused_moe_kernel"


class Watched:
    """The engine's kernel, which notes each configuration that it has been launched with."""

    def __init__(self, compiled: Any, launched: list[TileConfig]) -> None:
        self._compiled, self._launched = compiled, launched

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def __getitem__(self, grid: Any) -> Any:
        launch = self._compiled[grid]

        def launched(*args: Any, **kwargs: Any) -> Any:
            result = launch(*args, **kwargs)
            self._launched.append(tile_of(kwargs))
            return result

        return launched


class LayerChild:
    """Answers, by what is asked."""

    def __init__(self) -> None:
        self._said = attached.begin()
        self._engine: LoadedSglang | None = None
        self._layer: BenchedLayer | None = None
        self._looked_up: list[TileConfig] = []
        self._launched: list[TileConfig] = []

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """`limit` of shared memory in bytes that the MoE kernels shall meet, None for the card's own."""
        engine = runner.load()
        is_active = attached.is_active(attached.engine_here())
        if request["limit"] is not None:
            small_limit.simulate(request["limit"])
        setattr(engine.kernels, _KERNEL, Watched(getattr(engine.kernels, _KERNEL), self._launched))
        look_up = getattr(engine.layer, LOOKUP)

        def watched(*args: Any, **kwargs: Any) -> Any:
            found = look_up(*args, **kwargs)
            up, (down, _) = found
            self._looked_up += [tile_of(up), tile_of(down or up)]
            return found

        setattr(engine.layer, LOOKUP, watched)
        # At few tokens the engine sums by a function that torch.compile has to make first, seconds for each batch size.
        engine.layer.moe_sum_reduce_torch_compile = engine.layer.moe_sum_reduce
        self._engine = engine
        return {"active": is_active, "attached_ms": attached.attached_ms()}

    def layer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Make the weights of that `workload`, by its number."""
        assert self._engine is not None
        self._layer = None  # two of them may not fit
        self._layer = BenchedLayer(
            self._engine, WORKLOADS[request["workload"]].shape, routing.UNIFORM, seed=0, adapter=SGLANG
        )
        return {}

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """That many `tokens`: what was looked up and launched, up and down, and the error, or what was raised."""
        assert self._engine is not None and self._layer is not None
        self._looked_up.clear()
        self._launched.clear()
        batch = self._layer.batch(request["tokens"], seed=1)
        try:
            out = _run(self._engine, self._layer, self._layer.whole(batch, 0))
        except Exception as error:  # noqa: BLE001 - what it raises is what is asked for
            answer: dict[str, Any] = {"failure": f"{type(error).__name__}: {error}"}
        else:
            answer = {"error_of_output": self._layer.error(batch, 0, out)}
        return {
            **answer,
            "looked_up": [str(config) for config in self._looked_up],
            "launched": [str(config) for config in self._launched],
        }

    def said(self, _: dict[str, Any]) -> dict[str, Any]:
        """What was logged of tables and hooks."""
        return {"lines": self._said.lines}


def _run(engine: LoadedSglang, layer: BenchedLayer, tensors: LayerTensors) -> Any:
    """[tokens, hidden], waited for: by the layer itself, with whatever its lookup finds."""
    import torch

    quantization = layer.shape.quantization
    out = engine.layer.fused_experts_impl(
        tensors.hidden,
        tensors.w1,
        tensors.w2,
        tensors.topk_weights,
        tensors.topk_ids,
        use_fp8_w8a8=quantization.scheme == "fp8_w8a8",
        per_channel_quant=quantization.per_channel,
        w1_scale=tensors.w1_scale,
        w2_scale=tensors.w2_scale,
        block_shape=None if quantization.block_shape is None else list(quantization.block_shape),
        filter_expert=False,
    )
    torch.cuda.synchronize()
    return out


def main() -> None:
    out = take_standard_output()
    child = LayerChild()
    answer_all(out, {"load": child.load, "layer": child.layer, "run": child.run, "said": child.said})


if __name__ == "__main__":
    main()
