"""What a run will do, before it does it: candidates, binaries, the floor, what could be won. Needs no GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_moe_ext.core import PROJECTIONS, Gpu, GpuError, ModelError, MoEShape, TileConfig
from sglang_moe_ext.roofline import pair_floor_us
from sglang_moe_ext.tuning import predict, space, wave_model
from sglang_moe_ext.tuning.worker import Pair

DEFAULT_TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 8192, 16384)
"""Upstream's 18 batch sizes, and the two that a chunked prefill asks for: the engine takes the nearest, however far."""

_FIRST_FP8_SM = 89
SHORTLIST_KEYS = 32
SHORTLIST_GROUPED = 8
# One binary on one core takes 0.25 to 0.45 s, an import of the engine 7 s (SGLang 0.5.23, Triton 3.7.1, 2026-11-21).
_COMPILE_S, _START_S = 0.4, 10.0
_SCREEN_S = 0.004
_RACE_S = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """One M: the floor, and the predicted times of the best candidate and of what the engine takes today."""

    tokens: int
    floor_us: float
    best: TileConfig
    best_us: float
    incumbent_us: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do. `measures`: on the GPU, rather than by the model alone."""

    shape: MoEShape
    gpu: Gpu
    measures: bool
    sifted: space.Sifted
    rows: tuple[Row, ...]
    binaries: int
    estimated_s: float


def shortlist(candidates: tuple[TileConfig, ...], shape: MoEShape, gpu: Gpu, tokens: int) -> list[TileConfig]:
    """The candidates to measure at that M: the best-ranked keys, and the very best with every GROUP_SIZE_M."""
    ranked = predict.by_estimate(candidates, shape, gpu, tokens)
    keys = list(dict.fromkeys(config.compile_key for config in ranked))
    best, with_groups = set(keys[:SHORTLIST_KEYS]), set(keys[:SHORTLIST_GROUPED])
    taken: list[TileConfig] = []
    for config in ranked:
        if config.compile_key in with_groups:
            taken.append(config)
        elif config.compile_key in best:
            taken.append(config)
            best.remove(config.compile_key)
    return taken


def made(
    shape: MoEShape, gpu: Gpu, tokens: Sequence[int], incumbents: dict[int, Pair] | None, *, measures: bool
) -> Plan:
    """The plan of a run over those batch sizes.

    Raises:
        GpuError: the GPU cannot multiply the layer's operands at all.
        ModelError: the layer is so small, or its scales so fine, that no candidate suits it.
    """
    if shape.quantisation.scheme == "fp8_w8a8" and gpu.sm < _FIRST_FP8_SM:
        raise GpuError(
            f"{gpu.device_name} (sm_{gpu.sm}) has no fp8 matrix units: expected sm_{_FIRST_FP8_SM} or newer; "
            "engines run such weights through Marlin there, which reads no table"
        )
    sifted = space.sift(space.full_space(), shape, gpu)
    if not sifted.kept:
        dropped = ", ".join(f"{name} {count}" for name, count in sifted.dropped.items() if count)
        raise ModelError(f"no candidate is left for {shape} on {gpu.device_name}: the rules dropped all ({dropped})")
    rows = tuple(_row(sifted.kept, shape, gpu, m, None if incumbents is None else incumbents[m]) for m in tokens)
    if measures:
        listed = {m: shortlist(sifted.kept, shape, gpu, m) for m in tokens}
    else:
        listed = {m: predict.best_of_each_key(sifted.kept, shape, gpu, m)[: predict.FRONT] for m in tokens}
    jobs = {
        job
        for m, configs in listed.items()
        for config in configs
        for job in predict.jobs_of(config, shape, m, gpu.sm).values()
    }
    seconds = _START_S + len(jobs) * _COMPILE_S / (os.cpu_count() or 1)
    if measures:
        seconds += _START_S + sum(len(configs) * len(PROJECTIONS) * _SCREEN_S + _RACE_S for configs in listed.values())
    return Plan(shape, gpu, measures, sifted, rows, len(jobs), seconds)


def _row(candidates: tuple[TileConfig, ...], shape: MoEShape, gpu: Gpu, tokens: int, incumbent: Pair | None) -> Row:
    best = predict.by_estimate(candidates, shape, gpu, tokens)[0]
    return Row(
        tokens=tokens,
        floor_us=pair_floor_us(shape, gpu, tokens),
        best=best,
        best_us=_estimate({"up": best, "down": best}, shape, gpu, tokens),
        incumbent_us=None if incumbent is None else _estimate(incumbent, shape, gpu, tokens),
    )


def _estimate(pair: Pair, shape: MoEShape, gpu: Gpu, tokens: int) -> float:
    return sum(
        wave_model.gemm(config, shape, gpu, tokens, projection, wave_model.estimated(config, shape, gpu)).us
        for projection, config in pair.items()
    )
