"""A fused-MoE layer run by our kernels: rows keep the order of the experts from the sort to the last sum.

Our sort, which quantizes the tokens meanwhile where our up GEMM wants them so, or the engine's sort; the up GEMM,
SGLang's or ours; our activation, with the quantization where there is one; our down GEMM; a weighted sum that gathers a
token's rows in order. The inputs stay as they are until that sum: whatever fails before it, the engine's own kernels
can still run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sglang_moe_ext.core import MoEShape, TileConfig
from sglang_moe_ext.engines.tensors import GemmTensors, LayerTensors
from sglang_moe_ext.kernel_plans import (
    MOST_SORTED_EXPERTS,
    SCALE_GROUP,
    DownConfig,
    KernelPlan,
    ShortKDownConfig,
    UpConfig,
    WarpSpecializedDown,
    WarpSpecializedUp,
    padded_rows,
)

if TYPE_CHECKING:
    import torch

    from sglang_moe_ext.kernels.quantize import Scales
    from sglang_moe_ext.kernels.sort_tokens import SortedTokens


class HostEngine(Protocol):
    """What the layer needs of the engine that it runs in, where our kernels do not do all of it."""

    def align(
        self, topk_ids: torch.Tensor, block_m: int, experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sorted_token_ids, expert_ids, num_tokens_post_padded), as the engine's own sort makes them."""

    def launch_sorted_up(self, shape: MoEShape, tensors: GemmTensors, config: TileConfig) -> None:
        """The engine's own up GEMM, its rows in the order of the experts."""


@dataclass(frozen=True, slots=True)
class RowValues:
    """Activations between the GEMMs; in float8, with float32 scales of rows, or of 128 columns of a row."""

    values: torch.Tensor
    scale: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class SortedLayer:
    """One batch of one layer, its pairs sorted into blocks of the plan's `block_m`; `hidden`: what up reads."""

    engine: HostEngine
    shape: MoEShape
    tensors: LayerTensors
    plan: KernelPlan
    pairs_sorted: SortedTokens
    hidden: RowValues

    @property
    def aligned(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sorted_token_ids, expert_ids, num_tokens_post_padded), as every kernel behind the sort takes them."""
        return self.pairs_sorted.ids, self.pairs_sorted.experts, self.pairs_sorted.padded

    @property
    def rows(self) -> int:
        """Of what lies between the GEMMs; those of padding are never read into a result."""
        return padded_rows(self.tensors.topk_ids.numel(), self.shape.experts, self.plan.block_m)

    @property
    def has_experts_elsewhere(self) -> bool:
        """Whether ids may be -1."""
        return self.shape.ep > 1

    @property
    def pairs(self) -> int:
        """Of tokens and experts: ids of padding are at least this."""
        return self.tensors.topk_ids.numel()

    def scales(self, activations: torch.Tensor | None, weights: torch.Tensor | None) -> Scales | None:
        """Scales of one GEMM."""
        from sglang_moe_ext.kernels.quantize import Scales

        return None if activations is None or weights is None else Scales(self.shape.quantization, activations, weights)


def run(layer: SortedLayer, out: torch.Tensor, routed_scaling_factor: float = 1.0) -> None:
    """Write [tokens, hidden] to `out`, which may be the hidden states themselves."""
    gate_up = run_up(layer)
    inner = run_activation(layer, gate_up)
    del gate_up  # its memory is the next one's
    write_sum(layer, run_down(layer, inner), out, routed_scaling_factor)


def result(engine: HostEngine, shape: MoEShape, tensors: LayerTensors, plan: KernelPlan) -> torch.Tensor:
    """[tokens, hidden], the sort included."""
    import torch

    out = torch.empty_like(tensors.hidden)
    run(sort(engine, shape, tensors, plan), out)
    return out


def can_sort(shape: MoEShape) -> bool:
    """Whether our sort can run for that layer; else the engine's does."""
    return shape.experts <= MOST_SORTED_EXPERTS


def sort(engine: HostEngine, shape: MoEShape, tensors: LayerTensors, plan: KernelPlan) -> SortedLayer:
    """The batch, sorted here; nothing waits for the GPU."""
    from sglang_moe_ext.kernels import sort_tokens

    if not can_sort(shape):
        return take_sorted(engine, shape, tensors, plan, engine.align(tensors.topk_ids, plan.block_m, shape.experts))
    hidden = empty_hidden(shape, tensors, plan)
    quantized = None if hidden.scale is None else sort_tokens.QuantizedTokens(hidden.values, hidden.scale)
    made = sort_tokens.launch_sort(
        tensors.topk_ids, shape.experts, plan.block_m, hidden=tensors.hidden, quantized=quantized
    )
    return SortedLayer(engine, shape, tensors, plan, made, hidden)


def take_sorted(
    engine: HostEngine,
    shape: MoEShape,
    tensors: LayerTensors,
    plan: KernelPlan,
    aligned: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> SortedLayer:
    """The batch with a sort that the engine made; the hidden states are quantized where our up GEMM wants them so."""
    from sglang_moe_ext.kernels import swiglu
    from sglang_moe_ext.kernels.sort_tokens import SortedTokens

    hidden = empty_hidden(shape, tensors, plan)
    if hidden.scale is not None and shape.quantization.per_channel:
        swiglu.launch_swiglu_of_rows(tensors.hidden, None, hidden.values, hidden.scale)
    elif hidden.scale is not None:
        swiglu.launch_quantize(tensors.hidden, hidden.values, hidden.scale)
    return SortedLayer(engine, shape, tensors, plan, SortedTokens(*aligned), hidden)


def empty_hidden(shape: MoEShape, tensors: LayerTensors, plan: KernelPlan) -> RowValues:
    """What up reads [tokens, hidden]: the hidden states, or room for them in float8. The engine's up quantizes."""
    import torch

    hidden, quantization = tensors.hidden, shape.quantization
    if isinstance(plan.up, TileConfig) or quantization.scheme is None:
        return RowValues(hidden)
    values = torch.empty_like(hidden, dtype=torch.float8_e4m3fn)
    if quantization.per_channel:
        return RowValues(values, hidden.new_empty(hidden.shape[0], 1, dtype=torch.float32))
    return RowValues(values, _scale_for(hidden))


def run_up(layer: SortedLayer) -> RowValues:
    """Gate and up [rows, 2 I], or, where the up kernel is fused, what comes of them [rows, I]."""
    match layer.plan.up:
        case TileConfig() as config:
            gate_up = layer.tensors.hidden.new_empty(layer.rows, layer.shape.gemm("up")[0])
            layer.engine.launch_sorted_up(layer.shape, _engines_gemm(layer, gate_up), config)
            return RowValues(gate_up)
        case UpConfig() as config:
            return _run_sorted_up(layer, config)
        case WarpSpecializedUp() as config:
            return _run_warp_specialized_up(layer, config)


def _run_sorted_up(layer: SortedLayer, config: UpConfig) -> RowValues:
    import torch

    from sglang_moe_ext.kernels import sorted_up

    tensors, shape, hidden = layer.tensors, layer.shape, layer.hidden
    # A tile is quantized in the kernel where it has all the columns of a scale.
    quantizes = config.is_fused and hidden.scale is not None and config.block_n == SCALE_GROUP
    size = layer.rows, shape.intermediate_size if config.is_fused else shape.gemm("up")[0]
    gate_up = tensors.hidden.new_empty(*size, dtype=torch.float8_e4m3fn if quantizes else tensors.hidden.dtype)
    scale = _scale_for(gate_up) if quantizes else None
    sorted_up.launch_up(
        hidden.values, tensors.w1, gate_up, *layer.aligned, config,
        pairs=layer.pairs, top_k=shape.top_k, align_block_m=layer.plan.block_m,
        scales=layer.scales(hidden.scale, tensors.w1_scale), out_scale=scale,
    )  # fmt: skip
    return RowValues(gate_up, scale)


def _run_warp_specialized_up(layer: SortedLayer, config: WarpSpecializedUp) -> RowValues:
    """What comes of gate and up [rows, I]: float8 with its scales block-wise, else 16 bits."""
    import torch

    from sglang_moe_ext.kernels import warp_specialized_up

    tensors, shape, hidden = layer.tensors, layer.shape, layer.hidden
    quantizes = shape.quantization.is_block_wise
    dtype = torch.float8_e4m3fn if quantizes else tensors.hidden.dtype
    inner = tensors.hidden.new_empty(layer.rows, shape.intermediate_size, dtype=dtype)
    scale = None
    if quantizes and isinstance(layer.plan.down, WarpSpecializedDown):  # it loads the scales of a column fastest
        scale = inner.new_empty(shape.intermediate_size // SCALE_GROUP, layer.rows, dtype=torch.float32).T
    elif quantizes:
        scale = _scale_for(inner)
    warp_specialized_up.launch_up(
        hidden.values, tensors.w1, inner, *layer.aligned, config,
        pairs=layer.pairs, top_k=shape.top_k, a_scale=hidden.scale, weight_scale=tensors.w1_scale, out_scale=scale,
        experts_elsewhere=layer.has_experts_elsewhere,
    )  # fmt: skip
    return RowValues(inner, scale)


def run_activation(layer: SortedLayer, gate_up: RowValues) -> RowValues:
    """What the down GEMM reads [rows, I]: what the up kernel left, activated and quantized where it is not yet."""
    import torch

    from sglang_moe_ext.kernels import swiglu

    columns, is_scaled = layer.shape.intermediate_size, layer.shape.quantization.scheme is not None
    if gate_up.values.shape[1] == columns and is_scaled == (gate_up.scale is not None):
        return gate_up
    dtype = torch.float8_e4m3fn if is_scaled else gate_up.values.dtype
    inner = gate_up.values.new_empty(layer.rows, columns, dtype=dtype)
    if layer.shape.quantization.per_channel:
        of_rows = inner.new_empty(layer.rows, 1, dtype=torch.float32)
        swiglu.launch_swiglu_of_rows(gate_up.values, layer.aligned[2], inner, of_rows)
        return RowValues(inner, of_rows)
    scale = _scale_for(inner) if is_scaled else None
    swiglu.launch_swiglu(gate_up.values, layer.aligned[2], inner, scales=scale)
    return RowValues(inner, scale)


def run_down(layer: SortedLayer, inner: RowValues) -> torch.Tensor:
    """[rows, hidden], not yet weighted."""
    down = layer.tensors.hidden.new_empty(layer.rows, layer.shape.hidden_size)
    match layer.plan.down:
        case ShortKDownConfig() as config:
            _run_short_down(layer, inner, down, config)
        case DownConfig() as config:
            _run_sorted_down(layer, inner, down, config)
        case WarpSpecializedDown() as config:
            _run_warp_specialized_down(layer, inner, down, config)
    return down


def _run_short_down(layer: SortedLayer, inner: RowValues, down: torch.Tensor, config: ShortKDownConfig) -> None:
    from sglang_moe_ext.kernels import sorted_down_short_k

    _, experts, padded = layer.aligned
    sorted_down_short_k.launch_short_down(
        inner.values, layer.tensors.w2, down, experts, padded, config,
        align_block_m=layer.plan.block_m, scales=layer.scales(inner.scale, layer.tensors.w2_scale),
    )  # fmt: skip


def _run_sorted_down(layer: SortedLayer, inner: RowValues, down: torch.Tensor, config: DownConfig) -> None:
    from sglang_moe_ext.kernels import sorted_down

    _, experts, padded = layer.aligned
    sorted_down.launch_down(
        inner.values, layer.tensors.w2, down, experts, padded, config,
        align_block_m=layer.plan.block_m, scales=layer.scales(inner.scale, layer.tensors.w2_scale),
        experts_elsewhere=layer.has_experts_elsewhere,
    )  # fmt: skip


def _run_warp_specialized_down(
    layer: SortedLayer, inner: RowValues, down: torch.Tensor, config: WarpSpecializedDown
) -> None:
    from sglang_moe_ext.kernels import warp_specialized_down

    ids, experts, padded = layer.aligned
    warp_specialized_down.launch_down(
        inner.values, layer.tensors.w2, down, experts, padded, config,
        sorted_token_ids=ids, pairs=layer.pairs, a_scale=inner.scale, weight_scale=layer.tensors.w2_scale,
        experts_elsewhere=layer.has_experts_elsewhere,
    )  # fmt: skip


def write_sum(layer: SortedLayer, down: torch.Tensor, out: torch.Tensor, routed_scaling_factor: float = 1.0) -> None:
    """Each token's rows, weighted, in order, to `out` [tokens, hidden]."""
    import torch

    from sglang_moe_ext.kernels import gather_sum

    positions = layer.pairs_sorted.positions
    if positions is None:
        positions = torch.empty_like(layer.tensors.topk_ids, dtype=torch.int32, memory_format=torch.contiguous_format)
        gather_sum.launch_inverse(
            *layer.aligned, positions,
            align_block_m=layer.plan.block_m, experts_elsewhere=layer.has_experts_elsewhere,
        )  # fmt: skip
    gather_sum.launch_gather_sum(
        down, positions, layer.tensors.topk_weights, out, routed_scaling_factor=routed_scaling_factor
    )


def _scale_for(values: torch.Tensor) -> torch.Tensor:
    import torch

    rows, columns = values.shape
    return values.new_empty(rows, columns // SCALE_GROUP, dtype=torch.float32)


def _engines_gemm(layer: SortedLayer, out: torch.Tensor) -> GemmTensors:
    tensors, (ids, experts, padded) = layer.tensors, layer.aligned
    return GemmTensors(
        a=tensors.hidden,
        weights=tensors.w1,
        out=out,
        weight_scale=tensors.w1_scale,
        topk_weights=tensors.topk_weights,
        topk_ids=tensors.topk_ids,
        sorted_token_ids=ids,
        expert_ids=experts,
        num_tokens_post_padded=padded,
    )
