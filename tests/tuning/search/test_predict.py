"""A table without a GPU, from compilers that are tables: only what compiles, fits and is clean is ever in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest

from sglang_moe_ext.core import CompileJob, EngineError, Failure, MoEShape, Quantization, Resources, Target, TileConfig
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.tuning.bench.messages import Pair
from sglang_moe_ext.tuning.compile.kernel_source import Compiled
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import predict, space
from sglang_moe_ext.tuning.search.prediction_error import margin

GPU = find_gpu("H200")
SHAPE = MoEShape(128, 768, 2048, 8)
PROBLEM = Problem(SHAPE, GPU, "sglang")
BLOCK_WISE = MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128)))
CANDIDATES = space.prune(space.full_space(), SHAPE, GPU).kept
TOKENS = (1, 17, 64, 1024, 16384)
CLEAN = Resources(smem_bytes=65536, registers=128, spill_bytes=0)
FAULTS = {
    "fails": Failure("CompilationError", "refused"),
    "spills": Resources(65536, 255, 8),
    "does not fit": Resources(GPU.smem_per_block + 1, 128, 0),
}


class TableCompiler:
    """Gives every job the result of `result`, and remembers what it was asked."""

    def __init__(self, result: Callable[[CompileJob], Resources | Failure]) -> None:
        self.result = result
        self.asked: list[CompileJob] = []

    def __call__(self, jobs: Sequence[CompileJob]) -> Compiled:
        self.asked.extend(jobs)
        return {job: self.result(job) for job in jobs}


def predicted(compiler: TableCompiler, tokens: Sequence[int] = TOKENS) -> dict[int, predict.PredictedConfig]:
    return predict.predict_table(CANDIDATES, PROBLEM, tokens, compiler)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_what_is_ranked_first_and_has_a_fault_is_never_in_the_table(fault: Resources | Failure) -> None:
    best = {predict.best_of_each_key(CANDIDATES, PROBLEM, m)[0].compile_key for m in TOKENS}
    found = predicted(TableCompiler(lambda job: fault if job.key in best else CLEAN))
    assert best.isdisjoint(chosen.config.compile_key for chosen in found.values())


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_of_the_down_gemm_alone_is_enough(fault: Resources | Failure) -> None:
    best = {predict.best_of_each_key(CANDIDATES, PROBLEM, m)[0].compile_key for m in TOKENS}
    found = predicted(TableCompiler(lambda job: fault if job.projection == "down" and job.key in best else CLEAN))
    assert best.isdisjoint(chosen.config.compile_key for chosen in found.values())


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_clean_candidate_is_found_however_far_down_it_is_ranked(fault: Resources | Failure) -> None:
    last = predict.best_of_each_key(CANDIDATES, PROBLEM, 64)[-1]
    found = predicted(TableCompiler(lambda job: CLEAN if job.key == last.compile_key else fault), [64])
    assert found[64].config.compile_key == last.compile_key


def test_each_m_asked_for_has_an_entry() -> None:
    assert tuple(predicted(TableCompiler(lambda _: CLEAN))) == TOKENS


def test_an_m_asked_for_twice_has_one_entry() -> None:
    assert tuple(predicted(TableCompiler(lambda _: CLEAN), [64, 64])) == (64,)


def test_of_the_candidates_compiled_first_the_one_predicted_fastest_is_chosen() -> None:
    compiler = TableCompiler(lambda _: CLEAN)
    found = predicted(compiler, [64])[64]
    front = predict.best_of_each_key(CANDIDATES, PROBLEM, 64)[: predict.FRONT]
    resources = dict.fromkeys(("up", "down"), CLEAN)
    assert found.us == min(predict.cost_model.pair_us(config, SHAPE, GPU, 64, resources) for config in front)


def test_no_more_is_compiled_than_the_front_where_it_is_clean() -> None:
    compiler = TableCompiler(lambda _: CLEAN)
    predicted(compiler, [64])
    assert len({job.key for job in compiler.asked}) == predict.FRONT


def test_where_nothing_compiles_the_error_says_why() -> None:
    with pytest.raises(EngineError, match="M=64 on NVIDIA H200: refused"):
        predicted(TableCompiler(lambda _: FAULTS["fails"]), [64])


def test_a_compiler_that_cannot_begin_is_asked_once() -> None:
    compiler = TableCompiler(lambda _: Failure("CompilePoolUnable", "the kernel cannot be imported"))
    with pytest.raises(EngineError, match="nothing can be compiled: the kernel cannot be imported"):
        predicted(compiler, [64])
    assert len(compiler.asked) == 2 * predict.FRONT


def test_where_all_spill_the_error_has_the_figure() -> None:
    with pytest.raises(EngineError, match="M=64 on NVIDIA H200: all spill registers, the least 8 B a thread"):
        predicted(TableCompiler(lambda _: FAULTS["spills"]), [64])


def test_where_none_fits_the_error_has_the_figure() -> None:
    mi300x = replace(PROBLEM, gpu=find_gpu("MI300X"))
    large = Resources(smem_bytes=81920, registers=128, spill_bytes=0)
    expected = "on AMD Instinct MI300X: the smallest needs 81920 B of shared memory, and a block has 65536 B"
    with pytest.raises(EngineError, match=expected):
        predict.predict_table(CANDIDATES, mi300x, [64], TableCompiler(lambda _: large))


def test_without_candidates_there_is_an_error_rather_than_an_empty_table() -> None:
    with pytest.raises(EngineError, match="M=64"):
        predict.predict_table((), PROBLEM, [64], TableCompiler(lambda _: CLEAN))


@pytest.mark.parametrize("tokens", TOKENS)
def test_every_candidate_is_ranked_once(tokens: int) -> None:
    assert sorted(predict.by_estimate(CANDIDATES, PROBLEM, tokens)) == sorted(CANDIDATES)


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_ranking_keeps_one_candidate_of_each_binary(tokens: int) -> None:
    keys = [config.compile_key for config in predict.best_of_each_key(CANDIDATES, PROBLEM, tokens)]
    assert sorted(keys) == sorted({config.compile_key for config in CANDIDATES})


def test_the_binaries_of_a_config_are_those_of_both_gemms_for_any_group() -> None:
    config = TileConfig(16, 64, 128, 16, 4, 3)
    jobs = predict.list_jobs(config, replace(PROBLEM, shape=BLOCK_WISE), 64)
    assert {(name, job.projection, job.key, job.group_m, job.target) for name, job in jobs.items()} == {
        (projection, projection, config.compile_key, None, Target(90)) for projection in ("up", "down")
    }


FAST_TODAY = {
    m: {"up": chosen.config, "down": chosen.config} for m, chosen in predicted(TableCompiler(lambda _: CLEAN)).items()
}
SLOW_TODAY: dict[int, Pair] = {
    m: {"up": TileConfig(16, 32, 64, 1, 4, 2), "down": TileConfig(16, 32, 64, 1, 4, 2)} for m in TOKENS
}
OTHER_DOWN = TileConfig(16, 64, 64, 1, 4, 2)


def against(today: Mapping[int, Pair], compiler: TableCompiler) -> dict[int, predict.PredictedConfig]:
    return predict.predict_table(CANDIDATES, PROBLEM, TOKENS, compiler, today)


def test_what_runs_today_stays_where_nothing_is_predicted_faster() -> None:
    found = against(FAST_TODAY, TableCompiler(lambda _: CLEAN))
    assert all(it.keeps_today and it.pair == FAST_TODAY[m] for m, it in found.items())


def test_a_gain_beyond_the_error_of_the_model_is_taken() -> None:
    found = against(SLOW_TODAY, TableCompiler(lambda _: CLEAN))
    for m, it in found.items():
        assert it.gain is not None and it.keeps_today == (it.gain <= margin(m))
    assert not found[16384].keeps_today


def test_both_gemms_of_what_runs_today_stay() -> None:
    today = {m: {"up": pair["up"], "down": replace(pair["up"], num_stages=2)} for m, pair in FAST_TODAY.items()}
    found = against(today, TableCompiler(lambda _: CLEAN))
    assert all(it.pair == today[m] for m, it in found.items() if it.keeps_today)
    assert any(it.keeps_today for it in found.values())


def test_what_runs_today_but_does_not_fit_the_gpu_does_not_stay() -> None:
    keys = {pair["up"].compile_key for pair in FAST_TODAY.values()}
    found = against(FAST_TODAY, TableCompiler(lambda job: FAULTS["does not fit"] if job.key in keys else CLEAN))
    assert not any(it.keeps_today for it in found.values())
