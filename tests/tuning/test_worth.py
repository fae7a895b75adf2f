"""What tuning could win is said with its error, from what is known, and never as a wish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_moe_ext.core import DecoderShape, MoEShape, Quantization, TileConfig
from sglang_moe_ext.engines.lookup_probe import LookupResult
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.gpu.decoder_roofline import Surroundings
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.tuning import compare_configs, pipeline, tune_plan, weigh, worth_verdict
from sglang_moe_ext.tuning.compare_configs import ConfigComparison, TimedConfig
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.request import MeasureOptions, TuneRequest
from sglang_moe_ext.tuning.search.prediction_error import margin
from sglang_moe_ext.tuning.search.statistics import Interval
from sglang_moe_ext.tuning.weigh import guess_today
from sglang_moe_ext.tuning.worth import Worth, estimate

FP8 = MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128)))
UNKNOWN = MoEShape(48, 1280, 3072, 6)
QWEN = Surroundings(DecoderShape(48, 2048, heads=32, kv_heads=4, query_dim=128, value_dim=128), 48)
TOKENS = (64, 4096)
SMALL = TileConfig(16, 32, 64, 1, 4, 3)


@pytest.fixture(autouse=True)
def no_engine_and_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(specs, "detect", lambda: None)


def request(shape: MoEShape, surroundings: Surroundings | None = QWEN) -> TuneRequest:
    return TuneRequest(
        model="Some-MoE",
        architecture="",
        problem=Problem(shape, find_gpu("H200"), "sglang"),
        vllm_shape=None,
        gpu_is_here=False,
        tokens=TOKENS,
        measuring=None,
        install="none",
        output_dir=None,
        seed=0,
        command="plan",
        surroundings=surroundings,
    )


def answer(
    taken: Mapping[int, TileConfig], why: str | None = None, paths: Mapping[int, str] | None = None
) -> LookupResult:
    whys = {} if why is None else dict.fromkeys(taken, why)
    down = dict.fromkeys(taken)
    return LookupResult("0.5.23", "3.6.0", "NVIDIA H200", dict(taken), down, (), (), whys=whys, paths=paths or {})


def weighed(
    asked: TuneRequest, today: LookupResult | None, measured: Mapping[int, Interval] | None = None
) -> tuple[Worth, str]:
    found = estimate(asked, tune_plan.make_plan(asked, today), measured or {}, is_asked=today is not None)
    return found, "\n".join(worth_verdict.sentences(found))


def best_of(asked: TuneRequest) -> dict[int, TileConfig]:
    return {row.tokens: row.best for row in tune_plan.make_plan(asked, None).rows}


def test_a_gain_within_the_models_error_is_no_gain() -> None:
    asked = request(UNKNOWN)
    found, said = weighed(asked, answer(best_of(asked)))
    assert [row.tuning.low for row in found.rows] == [1.0, 1.0]
    assert "Tuning wins nothing that is certain of prefill at 4,096 tokens: the 1.00x that the model predicts" in said


def test_a_gain_beyond_the_error_is_a_range_that_the_error_widens() -> None:
    found, said = weighed(request(UNKNOWN), answer(dict.fromkeys(TOKENS, SMALL)))
    row = found.rows[1]
    assert row.today_us is not None and row.tuning.predicted is not None
    assert row.tuning.low == pytest.approx(row.tuning.predicted / margin(4096))
    assert row.tuning.high == row.tuning.predicted
    assert "Tuning can win at most about " in said and "SGLang has no table for this layer on this GPU" in said


def test_a_table_that_was_measured_on_this_gpu_leaves_nothing_to_count_on() -> None:
    found, said = weighed(request(UNKNOWN), answer(dict.fromkeys(TOKENS, SMALL), "your table, entry 64; measured"))
    assert {row.tuning.basis for row in found.rows} == {"tuned already"}
    assert "Tuning wins nothing to count on of prefill at 4,096 tokens: your table (measured) is in use there." in said


def test_a_table_that_was_measured_on_another_gpu_does_not_count_as_tuned() -> None:
    why = "the shipped table, entry 64; measured, made for NVIDIA H20"
    found, _ = weighed(request(UNKNOWN), answer(dict.fromkeys(TOKENS, SMALL), why))
    assert {row.tuning.basis for row in found.rows} == {"predicted"}


def test_the_share_of_a_pass_is_what_the_experts_take_of_it() -> None:
    found, _ = weighed(request(UNKNOWN), answer(dict.fromkeys(TOKENS, SMALL)))
    row = found.rows[1]
    assert row.moe_share is not None
    assert 0.3 < row.moe_share < 0.95
    assert row.saved(2.0) == pytest.approx(row.moe_share / 2)


def test_without_the_rest_of_the_model_the_gain_is_the_experts_alone() -> None:
    found, said = weighed(request(UNKNOWN, None), answer(dict.fromkeys(TOKENS, SMALL)))
    assert found.rows[1].saved(2.0) is None
    assert "% of what the experts take of prefill" in said


def test_the_gain_of_our_kernels_is_a_figure_that_was_measured() -> None:
    found, said = weighed(request(FP8), answer(dict.fromkeys(TOKENS, SMALL)))
    few, many = found.rows
    assert few.kernels is None
    assert many.kernels is not None
    assert many.kernels.value == pytest.approx(1.5327, abs=0.01)
    assert "NVIDIA H200, sglang 0.5.15, Triton 3.6.0, 2026-11-2" in said


def test_kernels_that_run_today_are_no_gain_to_come() -> None:
    _, said = weighed(request(FP8), answer(dict.fromkeys(TOKENS, SMALL), paths={4096: "up down"}))
    assert "Our kernels run there already: 1.53x" in said
    assert "Our kernels can win" not in said


def test_a_layer_that_nobody_measured_has_no_figure_of_our_kernels() -> None:
    found, _ = weighed(request(UNKNOWN), None)
    assert [row.kernels for row in found.rows] == [None, None]


def test_without_an_engine_a_known_table_is_a_guess() -> None:
    found = weigh.weigh(request(FP8), lambda *_: None).worth
    assert not found.is_asked
    assert {row.tuning.basis for row in found.rows} == {"tuned already"}
    said = worth_verdict.sentences(found)[0]
    assert "(measured) is in use there, by a guess, measured as 1." in said
    assert said.endswith("x as fast as what ran before.")


def test_without_an_engine_and_a_table_what_tuning_wins_is_unknown() -> None:
    assert guess_today(request(UNKNOWN)) is None
    found, said = weighed(request(UNKNOWN), None)
    assert {row.tuning.basis for row in found.rows} == {"unknown"}
    assert {row.saved_by_tuning() for row in found.rows} == {None}
    assert "What tuning can win of prefill at 4,096 tokens is not known: SGLang is not installed here" in said


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> TuneRequest:
    """A request of a machine whose GPU finds the model's best 1.2 times as fast at 4,096 tokens, and wrong at 64."""

    def compare(asked: TuneRequest, measuring: MeasureOptions, given: object, _: object) -> dict[int, ConfigComparison]:
        assert measuring.effort == "quick"
        gain = Interval(1.2, 1.18, 1.22)
        return {
            m: ConfigComparison({}, {weigh._BEST: TimedConfig(100.0, gain, error)}, 0.001, None)
            for m, error in ((64, 0.9), (4096, 1e-3))
        }

    monkeypatch.setattr(compare_configs, "run", compare)
    today = answer(dict.fromkeys(TOKENS, SMALL))
    monkeypatch.setattr(pipeline, "make_plan", lambda asked, *_, **__: tune_plan.make_plan(asked, today))
    measuring = MeasureOptions("full", (), None, None, ("0",))  # type: ignore[arg-type]
    return replace(request(UNKNOWN), measuring=measuring)


def test_where_the_gpu_is_a_measurement_replaces_the_models_figure(gpu: TuneRequest) -> None:
    found = weigh.weigh(gpu, lambda *_: None).worth
    assert [row.tuning.basis for row in found.rows] == ["predicted", "measured now"]
    assert (found.rows[1].tuning.low, found.rows[1].tuning.high) == (1.18, 1.22)
    assert ", as measured just now: " in worth_verdict.sentences(found)[0]
