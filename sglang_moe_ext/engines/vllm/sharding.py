"""How vLLM cuts a model's experts onto ranks; it fuses no shared experts into the routed ones."""

from __future__ import annotations

from sglang_moe_ext.core import ModelError, MoEModel, MoEShape, Parallelism

# A block that does not divide a rank's columns is refined to a smaller one (vLLM 0.33, oracle/fp8.py).
_FINER_BLOCKS = (64, 32)


def launched_shape(model: MoEModel, parallelism: Parallelism) -> MoEShape:
    """The layer that one rank launches. With expert parallelism vLLM splits by expert over all ranks; N stays whole.

    Raises:
        ModelError: the split is not even.
    """
    ranks, ep = parallelism.tp, parallelism.ep
    if ranks < 1 or ep < 1:
        raise ModelError(f"{ranks} ranks with {ep} expert-parallel ones: expected positive sizes")
    if ep > 1:
        if model.routed_experts % ranks:
            raise ModelError(f"{model.name} has {model.routed_experts} experts: {ranks} ranks do not divide them")
        experts, intermediate_size = model.routed_experts // ranks, model.intermediate_size
    else:
        if model.intermediate_size % ranks:
            raise ModelError(f"{model.name}: {ranks} ranks do not divide {model.intermediate_size} columns")
        experts, intermediate_size = model.routed_experts, model.intermediate_size // ranks
    quantization = model.quantization
    if quantization.block_shape is not None and quantization.is_block_wise:
        sizes = (quantization.block_shape[0], *_FINER_BLOCKS)
        edge = next((size for size in sizes if intermediate_size % size == 0), None)
        if edge is None:
            raise ModelError(f"{model.name}: {intermediate_size} columns a rank fit no quantization block of vLLM's")
        if edge != quantization.block_shape[0]:
            quantization = type(quantization)(quantization.scheme, (edge, edge), quantization.per_channel)
    return MoEShape(
        experts=experts,
        intermediate_size=intermediate_size,
        hidden_size=model.hidden_size,
        top_k=model.top_k,
        quantization=quantization,
        dtype=model.dtype,
        gated=model.gated,
        ep=ranks if ep > 1 else 1,
    )
