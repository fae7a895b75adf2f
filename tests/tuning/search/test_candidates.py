"""What is timed at one M: kept by the rules, of a common BLOCK_SIZE_M, with TMA where asked, and not too much of it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tune_regret import LAYERS
from sglang_moe_ext.cli import tune
from sglang_moe_ext.core import (
    PROJECTIONS,
    CompileJob,
    GpuError,
    ModelError,
    MoEShape,
    Parallelism,
    Projection,
    Quantization,
    Target,
    TileConfig,
)
from sglang_moe_ext.engines.sglang.sharding import launched_shape
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.models import builtin_models
from sglang_moe_ext.tuning import tune_plan
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import candidates
from sglang_moe_ext.tuning.search.candidates import Candidates
from sglang_moe_ext.tuning.search.screening import EFFORTS
from tests.examples import examples

GPUS = {name: find_gpu(name) for name in ("H200", "RTX 4090", "A100")}
SHAPES = sorted({launched_shape(model, Parallelism()) for model in builtin_models().values()}, key=str)
GLM = MoEShape(65, 1536, 2048, 5, fused_shared=1)
GLM_ON_H200 = Problem(GLM, GPUS["H200"], "sglang")
BOUND = 2500
WITH_TMA: list[tuple[Projection, ...]] = [(), ("up",), ("down",), ("up", "down")]

shapes = st.sampled_from(SHAPES)
gpu_names = st.sampled_from(sorted(GPUS))
tokens_of = st.sampled_from(tune_plan.DEFAULT_TOKENS)
keys_of = st.sampled_from([2, 3, 24, 96])
with_tma_of = st.sampled_from(WITH_TMA)
# The first example of a shape ranks 1,500 candidates, three times.
slow = settings(max_examples=examples(25))


@functools.cache
def kept_of(shape: MoEShape, gpu: str) -> tuple[TileConfig, ...]:
    """What the rules keep; nothing where the GPU cannot do the layer at all."""
    try:
        return tune_plan.prune_space(Problem(shape, GPUS[gpu], "sglang")).kept
    except (GpuError, ModelError):
        return ()


def listed(
    shape: MoEShape, gpu: str, tokens: int, keys: int | None, with_tma: tuple[Projection, ...] = ()
) -> Candidates:
    return candidates.list_candidates(
        kept_of(shape, gpu), Problem(shape, GPUS[gpu], "sglang"), tokens, keys=keys, with_tma=with_tma
    )


def without_tma(config: TileConfig) -> TileConfig:
    return dataclasses.replace(config, use_tma=False)


@slow
@given(shapes, gpu_names, tokens_of, keys_of, with_tma_of)
def test_every_candidate_is_kept_by_the_rules(
    shape: MoEShape, gpu: str, tokens: int, keys: int, with_tma: tuple[Projection, ...]
) -> None:
    kept = set(kept_of(shape, gpu))
    of = listed(shape, gpu, tokens, keys, with_tma)
    assert all(without_tma(config) in kept for configs in of.values() for config in configs)


@slow
@given(shapes, gpu_names, tokens_of, keys_of, with_tma_of)
def test_no_candidate_is_listed_twice(
    shape: MoEShape, gpu: str, tokens: int, keys: int, with_tma: tuple[Projection, ...]
) -> None:
    of = listed(shape, gpu, tokens, keys, with_tma)
    assert all(len(configs) == len(set(configs)) for configs in of.values())


@slow
@given(shapes, gpu_names, tokens_of)
def test_without_a_limit_all_that_the_rules_keep_are_listed(shape: MoEShape, gpu: str, tokens: int) -> None:
    of = listed(shape, gpu, tokens, None)
    assert all(sorted(of[projection]) == sorted(kept_of(shape, gpu)) for projection in PROJECTIONS)


@slow
@given(shapes, gpu_names, tokens_of, keys_of)
def test_so_many_binaries_are_listed_as_asked_for_or_all_that_there_are(
    shape: MoEShape, gpu: str, tokens: int, keys: int
) -> None:
    there = len({config.compile_key for config in kept_of(shape, gpu)})
    of = listed(shape, gpu, tokens, keys)
    assert all(len({config.compile_key for config in of[each]}) == min(keys, there) for each in PROJECTIONS)


@slow
@given(shapes, gpu_names, tokens_of, keys_of)
def test_each_binary_is_listed_with_every_group(shape: MoEShape, gpu: str, tokens: int, keys: int) -> None:
    groups = {config.group_m for config in kept_of(shape, gpu)}
    for configs in listed(shape, gpu, tokens, keys).values():
        for key in {config.compile_key for config in configs}:
            assert {config.group_m for config in configs if config.compile_key == key} == groups


@slow
@given(shapes, gpu_names, tokens_of, keys_of)
def test_both_gemms_have_candidates_of_a_common_block_size_m(shape: MoEShape, gpu: str, tokens: int, keys: int) -> None:
    of = listed(shape, gpu, tokens, keys)
    up, down = ({config.block_m for config in of[projection]} for projection in PROJECTIONS)
    assert up & down or not kept_of(shape, gpu)


@slow
@given(shapes, gpu_names, tokens_of, keys_of)
def test_a_search_that_ends_at_once_has_a_pair(shape: MoEShape, gpu: str, tokens: int, keys: int) -> None:
    found = listed(shape, gpu, tokens, keys)
    assert not found["up"] or found["up"][0].compile_key == found["down"][0].compile_key


@slow
@given(shapes, tokens_of, keys_of, with_tma_of)
def test_tma_is_tried_where_it_is_asked_for_and_nowhere_else(
    shape: MoEShape, tokens: int, keys: int, with_tma: tuple[Projection, ...]
) -> None:
    of = listed(shape, "H200", tokens, keys, with_tma)
    for projection in PROJECTIONS:
        with_it = {without_tma(config) for config in of[projection] if config.use_tma}
        plain = {config for config in of[projection] if not config.use_tma}
        assert with_it == (plain if projection in with_tma else set())


@slow
@given(shapes, gpu_names, tokens_of, keys_of)
def test_one_binary_follows_another_whole(shape: MoEShape, gpu: str, tokens: int, keys: int) -> None:
    for configs in listed(shape, gpu, tokens, keys, ("down",)).values():
        changes = [one.compile_key != other.compile_key for one, other in itertools.pairwise(configs)]
        assert sum(changes) + 1 == max(1, len({config.compile_key for config in configs}))


def binaries(shape: MoEShape) -> set[CompileJob]:
    sm = GPUS["H200"].sm
    return {
        job
        for m in tune_plan.DEFAULT_TOKENS
        for job in candidates.screening_jobs(
            listed(shape, "H200", m, EFFORTS["full"].keys, ("down",)),
            Problem(shape, replace(GPUS["H200"], target=Target(sm)), "sglang"),
            m,
        )
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_a_full_search_of_all_batch_sizes_needs_a_bounded_number_of_binaries(layer: str) -> None:
    given = tune.parser().parse_args([*LAYERS[layer], "--gpu", "H200", "--predict", "--install", "none"])
    assert 0 < len(binaries(tune.request_of(given, "").shape)) < BOUND


def test_batch_sizes_share_binaries() -> None:
    alone = sum(
        len(candidates.screening_jobs(listed(GLM, "H200", m, 96, ("down",)), GLM_ON_H200, m))
        for m in tune_plan.DEFAULT_TOKENS
    )
    assert len(binaries(GLM)) < alone / 2


def test_a_pair_needs_a_binary_of_each_gemm_for_its_own_group() -> None:
    pair = {"up": TileConfig(16, 64, 64, 8, 4, 3), "down": TileConfig(16, 128, 64, 1, 4, 4)}
    jobs = candidates.pair_jobs(pair, GLM_ON_H200, 64)  # type: ignore[arg-type]
    assert [(job.projection, job.key, job.group_m, job.sorted_rows) for job in jobs] == [
        ("up", pair["up"].compile_key, 8, False),
        ("down", pair["down"].compile_key, 1, False),
    ]


def test_tma_in_the_down_gemm_has_the_up_gemm_write_sorted_rows() -> None:
    pair = {"up": TileConfig(16, 64, 64, 8, 4, 3), "down": TileConfig(16, 128, 64, 1, 4, 4, use_tma=True)}
    assert [job.sorted_rows for job in candidates.pair_jobs(pair, GLM_ON_H200, 64)] == [True, False]  # type: ignore[arg-type]


def test_a_layer_that_the_gpu_cannot_do_has_no_candidates() -> None:
    assert kept_of(MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128))), "A100") == ()
