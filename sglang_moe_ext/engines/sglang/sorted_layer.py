"""SGLang's fused-MoE layer with our path behind its up GEMM: rows stay in the order of the experts to the last sum.

The engine's sort and its up GEMM, then our activation (with the quantisation, where there is one), our down GEMM
through TMA, and a weighted sum that gathers a token's rows in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_moe_ext.core import MoEShape, TileConfig
from sglang_moe_ext.engines.sglang import kernel
from sglang_moe_ext.engines.sglang.kernel import Engine
from sglang_moe_ext.engines.tensors import GemmTensors, LayerTensors, sorted_rows
from sglang_moe_ext.kernels import gather_sum, sorted_activation, sorted_down, sorted_up
from sglang_moe_ext.kernels.scales import Scales
from sglang_moe_ext.kernels.short_down import ShortDownConfig, launch_short_down
from sglang_moe_ext.kernels.sorted_down import DownConfig
from sglang_moe_ext.kernels.sorted_up import UpConfig

if TYPE_CHECKING:
    import torch


Up = TileConfig | UpConfig
"""The engine's up GEMM with that configuration, or ours, which may be fused with the activation."""

Down = DownConfig | ShortDownConfig


@dataclass(frozen=True, slots=True)
class Buffers:
    """What lies between the stages; None where a stage is not there.

    hidden_q [tokens, K] float8 and its scales; gate_up [rows, 2 I] or, where the activation is fused and the
    quantisation is not, [rows, I]; inner [rows, I] and its scales; down [rows, hidden].
    """

    hidden_q: tuple[torch.Tensor, torch.Tensor] | None
    gate_up: torch.Tensor | None
    inner: torch.Tensor
    inner_scale: torch.Tensor | None
    down: torch.Tensor
    positions: torch.Tensor
    out: torch.Tensor


def buffers(shape: MoEShape, hidden: torch.Tensor, up: Up) -> Buffers:
    """For a batch [tokens, hidden]; nothing in them is defined."""
    import torch

    tokens, width = hidden.shape
    rows = sorted_rows(shape, tokens, up.block_m)
    is_block, inner_size = shape.quantisation.is_block_wise, shape.intermediate_size
    groups = inner_size // sorted_activation.GROUP
    is_ours = isinstance(up, UpConfig)
    is_fused = isinstance(up, UpConfig) and up.is_fused
    is_whole = is_fused and (not is_block or up.block_n == sorted_activation.GROUP)
    hidden_q = None
    if is_ours and is_block:
        scale = hidden.new_empty(tokens, width // sorted_activation.GROUP, dtype=torch.float32)
        hidden_q = torch.empty_like(hidden, dtype=torch.float8_e4m3fn), scale
    return Buffers(
        hidden_q=hidden_q,
        gate_up=None if is_whole else hidden.new_empty(rows, inner_size if is_fused else shape.gemm("up")[0]),
        inner=hidden.new_empty(rows, inner_size, dtype=torch.float8_e4m3fn if is_block else hidden.dtype),
        inner_scale=hidden.new_empty(rows, groups, dtype=torch.float32) if is_block else None,
        down=hidden.new_empty(rows, shape.hidden_size),
        positions=torch.empty(tokens, shape.top_k, dtype=torch.int32, device=hidden.device),
        out=torch.empty_like(hidden),
    )


class Stages:
    """The stages of one batch; each queues its kernels, given that those before it have run."""

    def __init__(self, engine: Engine, shape: MoEShape, tensors: LayerTensors, up: Up, down: Down, to: Buffers) -> None:
        self._engine, self._shape, self._tensors, self._up, self._down, self._to = engine, shape, tensors, up, down, to
        self._aligned: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def all(self) -> dict[str, Callable[[], object]]:
        """In order, by name."""
        to = self._to
        return {
            "align": self._align,
            **({} if to.hidden_q is None else {"quantise": self._quantise}),
            "up": self._launch_up,
            **({} if to.gate_up is None else {"activation": self._activate}),
            "down": self._launch_down,
            "sum": self._sum,
        }

    def _scales(self, activations: torch.Tensor | None, weights: torch.Tensor | None) -> Scales | None:
        if activations is None or weights is None:
            return None
        return Scales(self._shape.quantisation, activations, weights)

    def _align(self) -> None:
        self._aligned = self._engine.align(self._tensors.topk_ids, self._up.block_m, self._shape.experts)

    def _quantise(self) -> None:
        if self._to.hidden_q is not None:
            sorted_activation.launch_quantise(self._tensors.hidden, *self._to.hidden_q)

    def _launch_up(self) -> None:
        tensors, to = self._tensors, self._to
        if isinstance(self._up, UpConfig):
            a, scale = (tensors.hidden, None) if to.hidden_q is None else to.hidden_q
            sorted_up.launch_up(
                a, tensors.w1, to.inner if to.gate_up is None else to.gate_up, *self._aligned, self._up,
                pairs=tensors.topk_ids.numel(), top_k=self._shape.top_k, align_block_m=self._up.block_m,
                scales=self._scales(scale, tensors.w1_scale),
                out_scale=to.inner_scale if to.gate_up is None else None,
            )  # fmt: skip
            return
        assert to.gate_up is not None
        gemm = GemmTensors(
            a=tensors.hidden,
            weights=tensors.w1,
            out=to.gate_up,
            weight_scale=tensors.w1_scale,
            topk_weights=tensors.topk_weights,
            topk_ids=tensors.topk_ids,
            sorted_token_ids=self._aligned[0],
            expert_ids=self._aligned[1],
            num_tokens_post_padded=self._aligned[2],
        )
        kernel.launch(self._engine, self._shape, "up", gemm, self._up, writes_sorted=True)

    def _activate(self) -> None:
        assert self._to.gate_up is not None
        sorted_activation.launch_swiglu(self._to.gate_up, self._aligned[2], self._to.inner, scales=self._to.inner_scale)

    def _launch_down(self) -> None:
        to, weights, experts, padded = self._to, self._tensors.w2, self._aligned[1], self._aligned[2]
        align, scales = self._up.block_m, self._scales(to.inner_scale, self._tensors.w2_scale)
        match self._down:
            case ShortDownConfig() as short:
                launch_short_down(
                    to.inner, weights, to.down, experts, padded, short, align_block_m=align, scales=scales
                )
            case DownConfig() as config:
                sorted_down.launch_down(
                    to.inner, weights, to.down, experts, padded, config,
                    align_block_m=align, scales=scales, experts_elsewhere=self._shape.ep > 1,
                )  # fmt: skip

    def _sum(self) -> None:
        ids, experts, padded = self._aligned
        gather_sum.launch_inverse(
            ids, experts, padded, self._to.positions,
            align_block_m=self._up.block_m, experts_elsewhere=self._shape.ep > 1,
        )  # fmt: skip
        gather_sum.launch_gather_sum(self._to.down, self._to.positions, self._tensors.topk_weights, self._to.out)


def run(engine: Engine, shape: MoEShape, tensors: LayerTensors, up: Up, down: Down) -> torch.Tensor:
    """[tokens, hidden]."""
    to = buffers(shape, tensors.hidden, up)
    for launch in Stages(engine, shape, tensors, up, down, to).all().values():
        launch()
    return to.out
