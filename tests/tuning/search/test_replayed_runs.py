"""Complete runs on an H200, decided again from their journals: whatever the figures, the choices follow the rules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_moe_ext.tuning import tune_plan
from sglang_moe_ext.tuning.bench import messages_json
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    LayerTimes,
    Measure,
    Pair,
)
from sglang_moe_ext.tuning.run.journal import Journal, UnknownRequestError
from sglang_moe_ext.tuning.search import screening
from sglang_moe_ext.tuning.search.final_comparison import LEAST_GAIN, TOLERATED_ERROR, MeasuredChoice
from sglang_moe_ext.tuning.search.screening import EFFORTS
from sglang_moe_ext.tuning.search.statistics import gain
from tests.tuning.recorded_runs import LAYERS, ReplayingStation, incumbents_of, measured, recorded, replayed, tasks_of

FEW = (16, 1024)


def what_changed(layer: str, request: BenchRequest) -> str:
    """Which constant makes the strategy measure what the recorded run did not."""
    there = [each for each, _ in recorded(layer).results.values() if each.tokens == request.tokens]
    if not there:
        return "tune_plan.DEFAULT_TOKENS"
    match request:
        case BenchGemm():
            return _what_changed_of_screens(request, [each for each in there if isinstance(each, BenchGemm)])
        case BenchLayers(rounds=rounds):
            races = [each for each in there if isinstance(each, BenchLayers)]
            if rounds not in {race.rounds for race in races}:
                return "EFFORTS['full'].rounds"
            if len(request.pairs) not in {len(race.pairs) for race in races}:
                return "EFFORTS['full'].finalists"
            return "search._PER_BLOCK_M, or how search.finalists ranks pairs"
        case CheckAccuracy():
            return "final_comparison.LEAST_GAIN, final_comparison.TOLERATED_ERROR, or how it ranks the runners"


def _what_changed_of_screens(request: BenchGemm, there: list[BenchGemm]) -> str:
    alike = [
        each
        for each in there
        if each.projection == request.projection and (len(each.groups) > 1) == (len(request.groups) > 1)
    ]
    of_key = [each for each in alike if each.key == request.key]
    grouped = len(request.groups) > 1
    if any(each.groups == request.groups for each in of_key):
        return "search._GROUPED_SAMPLES" if grouped else "search._SAMPLES"
    if of_key:
        return "the GROUP_SIZE_M of space.full_space, or the wave model's order of them"
    if grouped and sum(each.key.use_tma == request.key.use_tma for each in alike) != EFFORTS["full"].grouped:
        return "EFFORTS['full'].grouped"
    if grouped:
        return "search._HOPELESS, or how search.screened ranks what it timed"
    without_tma = {each.key for each in alike if not each.key.use_tma}
    if len(without_tma) != EFFORTS["full"].keys:
        return "EFFORTS['full'].keys"
    return "space.full_space, space.RULES, the wave model, or which twins have TMA"


def replaying(layer: str) -> Measure:
    """The recorded results; a request that has none names the constant that changed."""

    def answered(request: BenchRequest) -> BenchResult:
        try:
            return replayed(layer)(request)
        except UnknownRequestError as error:
            changed = what_changed(layer, request)
            pytest.fail(f"{layer}: {request} was not recorded: {changed} changed; record the run anew ({error})")

    return answered


@dataclasses.dataclass(frozen=True)
class Replay:
    layer: str
    results: dict[int, MeasuredChoice]
    asked: list[BenchRequest]
    journal: Journal

    def known(self, request: BenchRequest) -> BenchResult | None:
        return self.journal.result(request)


@pytest.fixture(scope="module", params=LAYERS)
def replay(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    layer, path = request.param, tmp_path_factory.mktemp("replay") / "journal.jsonl"
    executor = ReplayingStation(replaying(layer))
    journal = Journal.create(path, recorded(layer).circumstances)
    return Replay(layer, measured(layer, journal, [executor]), executor.asked, journal)


def race_of(replay: Replay, tokens: int) -> tuple[BenchLayers, LayerTimes]:
    """The race that decided that M: the last one."""
    race = [asked for asked in replay.asked if isinstance(asked, BenchLayers) and asked.tokens == tokens][-1]
    result = replay.known(race)
    assert isinstance(result, LayerTimes)
    return race, result


def is_right(replay: Replay, tokens: int, pair: Pair) -> bool:
    result = replay.known(CheckAccuracy(tokens, pair))
    tolerated = TOLERATED_ERROR[LAYERS[replay.layer].quantization.scheme]
    return isinstance(result, Accuracy) and result.error <= tolerated


@pytest.mark.parametrize("layer", LAYERS)
def test_the_recording_is_complete(layer: str) -> None:
    assert recorded(layer).is_finished


@pytest.mark.parametrize("layer", LAYERS)
def test_the_recording_is_of_the_layer_that_it_is_replayed_for(layer: str) -> None:
    assert recorded(layer).circumstances["shape"] == str(LAYERS[layer])


def test_each_batch_size_has_a_choice(replay: Replay) -> None:
    assert tuple(replay.results) == tune_plan.DEFAULT_TOKENS


def test_nothing_is_asked_twice(replay: Replay) -> None:
    assert len({messages_json.identity(request) for request in replay.asked}) == len(replay.asked)


def test_the_choice_took_part_in_the_race_that_decided(replay: Replay) -> None:
    assert all(result.pair in race_of(replay, m)[0].pairs for m, result in replay.results.items())


def test_the_choice_was_checked_and_is_right(replay: Replay) -> None:
    assert all(is_right(replay, m, result.pair) for m, result in replay.results.items())


def test_the_choice_is_a_candidate_or_the_incumbent(replay: Replay) -> None:
    listed = {task.tokens: task.listed for task in tasks_of(replay.layer)}
    for m, result in replay.results.items():
        timed = all(config in listed[m][projection] for projection, config in result.pair.items())
        assert timed or result.pair == incumbents_of(replay.layer)[m]


def test_the_choice_has_one_block_size_m_for_both_gemms(replay: Replay) -> None:
    assert all(result.pair["up"].block_m == result.pair["down"].block_m for result in replay.results.values())


def test_an_incumbent_that_stays_gains_nothing(replay: Replay) -> None:
    stays = [result for result in replay.results.values() if result.pair == result.incumbent]
    assert {(result.gain.low, result.gain.value, result.gain.high) for result in stays} <= {(1.0, 1.0, 1.0)}


def test_a_right_incumbent_gives_way_to_a_gain_beyond_doubt_alone(replay: Replay) -> None:
    for m, result in replay.results.items():
        was_wrong = replay.known(CheckAccuracy(m, result.incumbent)) is not None and not is_right(
            replay, m, result.incumbent
        )
        if result.pair != result.incumbent and result.noise is not None and not was_wrong:
            assert result.gain.low > 1, m
            assert result.gain.value > 1 + max(LEAST_GAIN, result.noise), m


def test_who_gained_more_than_the_choice_was_wrong(replay: Replay) -> None:
    for m, result in replay.results.items():
        if result.noise is None:
            continue  # there was no incumbent to gain on
        race, raced = race_of(replay, m)
        first, *times, again = raced.us
        mean = [(one + other) / 2 for one, other in zip(first, again, strict=True)]
        for pair, us in zip(race.pairs[1:-1], times, strict=True):
            won = gain(mean, us, raced.routings)
            beats = won.low > 1 and won.value > max(result.gain.value, 1 + max(LEAST_GAIN, result.noise or 0.0))
            assert not beats or not is_right(replay, m, pair), m


def test_the_incumbent_is_raced_first_and_last(replay: Replay) -> None:
    for m, incumbent in incumbents_of(replay.layer).items():
        race = next(asked for asked in replay.asked if isinstance(asked, BenchLayers) and asked.tokens == m)
        assert race.pairs[0] == race.pairs[-1] == incumbent


def test_every_candidate_counts_as_tried(replay: Replay) -> None:
    for task in tasks_of(replay.layer):
        keys = sum(len({config.compile_key for config in of}) for of in task.listed.values())
        assert replay.results[task.tokens].tried == keys


def test_a_finished_run_is_decided_again_without_a_question(replay: Replay) -> None:
    executor = ReplayingStation(lambda request: pytest.fail(f"asked {request}"))
    assert measured(replay.layer, Journal.open(replay.journal.path), [executor]) == replay.results


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "search._SAMPLES": lambda patch: patch.setattr(screening, "_SAMPLES", 99),
    "search._GROUPED_SAMPLES": lambda patch: patch.setattr(screening, "_GROUPED_SAMPLES", 99),
    **{
        f"EFFORTS['full'].{name}": functools.partial(
            lambda name, patch: patch.setitem(
                EFFORTS, "full", dataclasses.replace(EFFORTS["full"], **{name: getattr(EFFORTS["full"], name) + 1})
            ),
            name,
        )
        for name in ("keys", "grouped", "finalists", "rounds")
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_constant_that_changed_since_is_named(change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layer = next(iter(LAYERS))
    CHANGES[change](monkeypatch)
    with pytest.raises(pytest.fail.Exception, match=change.replace("[", r"\[").replace("]", r"\]")):
        measured(layer, Journal.create(tmp_path / "j.jsonl", {}), [ReplayingStation(replaying(layer))], FEW)
