"""How vLLM splits a model's experts over ranks; it fuses no shared experts into the routed ones."""

from __future__ import annotations

import math
from dataclasses import replace

from sglang_moe_ext.core import ModelError, MoEModel, MoEShape, Parallelism, Quantization
from sglang_moe_ext.engines.weight_only import halve_group

Version = tuple[int, int, int]
NEWEST: Version = (0, 33, 0)
"""The newest release whose rules were checked."""
_FIRST_WITH_FINER_BLOCKS: Version = (0, 33, 0)
"""0.20 and 0.25 raise where a split cuts through a block; releases between 0.25 and 0.33 were not looked at."""
_SMALLEST_BLOCK = 32
_METHODS_OF_WNA16 = (None, "awq", "gptq", "auto_round", "moe_wna16")
"""Checkpoints whose experts MoeWNA16Method takes where Marlin does not, and halves their groups; None: not known."""


def launched_shape(
    model: MoEModel, parallelism: Parallelism, *, engine_version: tuple[int, int, int] = NEWEST
) -> MoEShape:
    """The layer that one rank launches. With expert parallelism vLLM splits by expert over all ranks; N stays whole.

    Raises:
        ModelError: the split is not even, or cuts through a quantization block that this release does not refine.
    """
    experts, intermediate_size = _split(model, parallelism)
    return MoEShape(
        experts=experts,
        intermediate_size=intermediate_size,
        hidden_size=model.hidden_size,
        top_k=model.top_k,
        quantization=_quantization(model, intermediate_size, parallelism, engine_version),
        # its platform prefers bfloat16 from Ampere on (config/model.py, platforms/cuda.py)
        dtype="bfloat16" if model.dtype == "float32" else model.dtype,
        gated=model.gated,
        ep=parallelism.tp if parallelism.ep > 1 else 1,
        zero_experts=model.zero_experts,
    )


def _split(model: MoEModel, parallelism: Parallelism) -> tuple[int, int]:
    """(experts, intermediate size) of a rank."""
    ranks, ep = parallelism.tp, parallelism.ep
    if ranks < 1 or ep < 1:
        raise ModelError(f"{ranks} ranks with {ep} expert-parallel ones: expected positive sizes")
    if ep > 1:
        if model.routed_experts % ranks:
            raise ModelError(f"{model.name} has {model.routed_experts} experts: {ranks} ranks do not divide them")
        return model.routed_experts // ranks, model.intermediate_size
    if model.intermediate_size % ranks:
        raise ModelError(f"{model.name}: {ranks} ranks do not divide {model.intermediate_size} columns")
    return model.routed_experts, model.intermediate_size // ranks


def _quantization(model: MoEModel, intermediate_size: int, parallelism: Parallelism, version: Version) -> Quantization:
    """The scales of a rank's part: blocks are refined, and groups of weights alone are halved, until they divide it."""
    quantization = model.quantization
    if quantization.is_block_wise and quantization.block_shape is not None:
        is_split = parallelism.ep == 1 and parallelism.tp > 1
        block = _refine_block(quantization.block_shape, intermediate_size, model.hidden_size, is_split=is_split)
        if block is not None and version >= _FIRST_WITH_FINER_BLOCKS and block[0] >= _SMALLEST_BLOCK:
            return replace(quantization, block_shape=block)
        if block is not None:
            release = ".".join(map(str, version))
            raise ModelError(
                f"{model.name}: {intermediate_size} columns a rank are no multiple of its block "
                f"{list(quantization.block_shape)}: vLLM {release} refuses to load that (from 0.33 on it refines "
                f"blocks down to {_SMALLEST_BLOCK}); use fewer ranks, or expert parallelism"
            )
        return quantization
    method = None if quantization.checkpoint is None else quantization.checkpoint.method
    if method in _METHODS_OF_WNA16:
        return halve_group(quantization, intermediate_size, model.hidden_size, model.name, "vLLM")
    return quantization


def _refine_block(
    block: tuple[int, int], intermediate_size: int, hidden_size: int, *, is_split: bool
) -> tuple[int, int] | None:
    """None where the block divides a rank's columns. As `refine_fp8_moe_block_shape` of 0.33 (oracle/fp8.py)."""
    if intermediate_size % block[0] == 0 and not (is_split and intermediate_size % block[1]):
        return None
    edge = math.gcd(*block, intermediate_size, hidden_size)
    return edge, edge
