"""How SGLang cuts a model's experts onto ranks: what E, N and top-k a rank's kernel sees."""

from __future__ import annotations

from sglang_moe_ext.core import ModelError, MoEModel, MoEShape, Parallelism
from sglang_moe_ext.engines.sglang.fusion import fused_shared_experts

NEWEST = (0, 5, 23)
"""The newest release whose rules were checked."""


def launched_shape(
    model: MoEModel,
    parallelism: Parallelism,
    *,
    engine_version: tuple[int, int, int] = NEWEST,
    fuse_shared_experts: bool = True,
) -> MoEShape:
    """The layer that one rank launches.

    Raises:
        ModelError: the split is not even, or cuts through a quantisation block.
    """
    tp, ep = parallelism.tp, parallelism.ep
    if tp < 1 or ep < 1 or tp % ep:
        raise ModelError(f"--tp-size {tp} with --ep-size {ep}: expected positive sizes with tp divisible by ep")
    if model.routed_experts % ep:
        raise ModelError(f"{model.name} has {model.routed_experts} experts: --ep-size {ep} does not divide them")
    if model.intermediate_size % parallelism.moe_tp:
        raise ModelError(
            f"{model.name} has an expert intermediate size of {model.intermediate_size}: "
            f"--tp-size {tp} with --ep-size {ep} would cut it into {parallelism.moe_tp} uneven parts; "
            "choose a size that divides it"
        )
    intermediate_size = model.intermediate_size // parallelism.moe_tp
    block = model.quantisation.block_shape
    if block is not None and block[0] and intermediate_size % block[0]:
        raise ModelError(
            f"{model.name}: {intermediate_size} columns a rank are no multiple of its block {list(block)}; "
            f"SGLang refuses --tp-size {tp} for it; use a smaller --tp-size, or --ep-size"
        )
    fused = fused_shared_experts(model, ep, engine_version) if fuse_shared_experts else 0
    return MoEShape(
        experts=model.routed_experts // ep + fused,
        intermediate_size=intermediate_size,
        hidden_size=model.hidden_size,
        top_k=model.top_k + fused,
        quantisation=model.quantisation,
        dtype=model.dtype,
        gated=model.gated,
        ep=ep,
        fused_shared=fused,
    )
