"""The journal: what was answered is known again, whatever cut the file short; what is no journal is named."""

from __future__ import annotations

import gzip
import json
import math
import resource
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_moe_ext.core import CompileKey, Failure, MoEExtError, StoreError, TileConfig
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
)
from sglang_moe_ext.tuning.bench.messages_json import identity
from sglang_moe_ext.tuning.run import journal_reader
from sglang_moe_ext.tuning.run.journal import Journal, replay
from tests.examples import examples
from tests.tuning.journal_strategies import answer_of, halving, request, trials

CIRCUMSTANCES = {"shape": "E=8", "gpu": "table", "seed": 0, "driver": None, "routing": True, "skew": 1.5}
CONFIG = TileConfig(64, 128, 64, 8, 4, 3)
RACE = BenchLayers(64, ({"up": CONFIG, "down": CONFIG},), 2)
CHECK = CheckAccuracy(64, {"up": CONFIG, "down": CONFIG})


def made(path: Path, count: int) -> Path:
    """A journal of that many results."""
    journal = Journal.create(path, CIRCUMSTANCES)
    for number in range(1, count + 1):
        journal.record(request(number), answer_of(request(number)))
    journal.close()
    return path


def results(path: Path) -> list[tuple[BenchRequest, BenchResult]]:
    return list(journal_reader.read(path).results.values())


@given(st.lists(trials, max_size=4))
def test_what_was_recorded_is_known_again(tmp_path_factory: pytest.TempPathFactory, told: list[Any]) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    journal = Journal.create(path, CIRCUMSTANCES)
    given_back = [journal.record(*trial) for trial in told]
    again = Journal.open(path)
    assert [again.result(asked) for asked, _ in told] == given_back


@given(trials)
def test_an_answer_is_kept_but_for_its_rounding(tmp_path_factory: pytest.TempPathFactory, told: Any) -> None:
    asked, result = told
    kept = Journal.create(tmp_path_factory.mktemp("journal") / "journal.jsonl", {}).record(asked, result)
    match kept, result:
        case GemmTimes(us) | LayerTimes(us), GemmTimes(given_us) | LayerTimes(given_us):
            pairs = [both for rows in zip(us, given_us, strict=True) for both in zip(*rows, strict=True)]
            assert all(mine == theirs or abs(mine - theirs) <= 0.00501 for mine, theirs in pairs)
        case Accuracy(error), Accuracy(given_error):
            assert error == pytest.approx(given_error, rel=1e-5)
        case _:
            assert kept == result


@given(trials, trials)
def test_two_questions_are_one_only_where_all_but_the_limit_is_equal(mine: Any, theirs: Any) -> None:
    bare = [replace(asked, limit_us=None) if isinstance(asked, BenchGemm) else asked for asked, _ in (mine, theirs)]
    assert (identity(mine[0]) == identity(theirs[0])) == (bare[0] == bare[1])


@pytest.mark.parametrize(
    "other",
    [
        replace(request(1), tokens=2),
        replace(request(1), projection="down"),
        replace(request(1), key=CompileKey(64, 128, 64, 4, 3, True)),
        replace(request(1), groups=(1, 8)),
        replace(request(1), samples=3),
    ],
    ids=["tokens", "projection", "TMA", "groups", "samples"],
)
def test_another_question_is_not_known(tmp_path: Path, other: BenchGemm) -> None:
    assert Journal.open(made(tmp_path / "journal.jsonl", 1)).result(other) is None


def test_a_repeated_race_is_another_question(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "journal.jsonl", {})
    journal.record(RACE, answer_of(RACE))
    assert journal.result(replace(RACE, attempt=1)) is None


def test_a_race_on_other_data_is_another_question(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "journal.jsonl", {})
    journal.record(RACE, answer_of(RACE))
    assert journal.result(replace(RACE, data=1)) is None


def test_a_clock_of_0_mhz_is_none(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "journal.jsonl", {})
    assert journal.record(RACE, LayerTimes(((1.0, 2.0),), 1, None, 0)) == LayerTimes(((1.0, 2.0),), 1, None, None)


def test_the_limit_of_a_screen_changes_nothing(tmp_path: Path) -> None:
    journal = Journal.open(made(tmp_path / "journal.jsonl", 1))
    assert journal.result(replace(request(1), limit_us=7.0)) == journal.result(request(1))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("asked", [request(1), RACE, CHECK], ids=["screen", "race", "check"])
def test_numbers_that_json_lacks_survive_as_plain_json(tmp_path: Path, asked: BenchRequest, value: float) -> None:
    result: BenchResult = {
        BenchGemm: GemmTimes(((value,), (1.0,))),
        BenchLayers: LayerTimes(((value, 1.0),), 1),
        CheckAccuracy: Accuracy(value),
    }[type(asked)]
    path = tmp_path / "journal.jsonl"
    Journal.create(path, {}).record(asked, result)
    json.loads(path.read_text().splitlines()[1], parse_constant=pytest.fail)
    assert repr(Journal.open(path).result(asked)) == repr(result)


def test_what_is_known_is_not_asked_again(tmp_path: Path) -> None:
    journal = Journal.open(made(tmp_path / "journal.jsonl", 3))
    asked: list[BenchRequest] = []

    def gpu(of: BenchRequest) -> BenchResult:
        asked.append(of)
        return answer_of(of)

    measure = journal.through(gpu)
    for number in (1, 4, 2, 4):
        measure(request(number))
    assert asked == [request(4)]


def test_a_failure_of_a_candidate_is_not_met_again(tmp_path: Path) -> None:
    path, hang = tmp_path / "journal.jsonl", Failure("Timeout", "no result within 120 s")
    Journal.create(path, {}).through(lambda _: hang)(RACE)
    assert Journal.open(path).result(RACE) == hang


@pytest.mark.parametrize("kind", ["Interrupted", "OutOfMemoryError", "Closed", "CompilePoolUnable"])
def test_a_failure_of_the_machine_is_asked_again(kind: str, tmp_path: Path) -> None:
    path, interrupted = tmp_path / "journal.jsonl", Failure(kind, "no fault of the candidate")
    assert Journal.create(path, {}).through(lambda _: interrupted)(RACE) == interrupted
    assert Journal.open(path).result(RACE) is None


def test_a_message_as_long_as_a_compilers_is_cut(tmp_path: Path) -> None:
    kept = Journal.create(tmp_path / "journal.jsonl", {}).record(RACE, Failure("PTXASError", "x" * 10_000_000))
    assert isinstance(kept, Failure) and len(kept.message) == 1000


def test_an_answer_to_another_question_is_refused_before_it_is_written(tmp_path: Path) -> None:
    path = made(tmp_path / "journal.jsonl", 0)
    with pytest.raises(StoreError, match="2 rows"):
        Journal.open(path).record(request(1), GemmTimes(((1.0,),)))
    assert results(path) == []


def test_threads_that_share_a_journal_lose_and_mix_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal.create(path, {})
    threads = [
        threading.Thread(target=lambda: [journal.through(answer_of)(request(n)) for n in range(1, 200)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(asked.tokens for asked, _ in results(path)) == Counter(range(1, 200))
    assert len(path.read_bytes().splitlines()) == 200


def test_each_answer_is_one_line_of_the_file_at_once(tmp_path: Path) -> None:
    path = made(tmp_path / "journal.jsonl", 0)
    journal = Journal.open(path)
    for number in range(1, 5):
        journal.record(request(number), answer_of(request(number)))
        assert len(path.read_bytes().splitlines()) == number + 1


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_cut_at_any_byte_a_journal_loses_its_last_line_alone(tmp_path: Path, closed: bool) -> None:
    path = made(tmp_path / "journal.jsonl", 5)
    if closed:
        Journal.open(path).finish()
    whole, told = path.read_bytes(), results(path)
    for length in range(whole.index(b"\n") + 1, len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = whole[:length].count(b"\n") - 1
        assert results(path) == told[:kept]


def test_cut_at_any_byte_a_journal_goes_on_as_if_never_cut(tmp_path: Path) -> None:
    path = made(tmp_path / "journal.jsonl", 4)
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole) + 1):
        path.write_bytes(whole[:length])
        measure = Journal.open(path).through(answer_of)
        for number in range(1, 5):
            measure(request(number))
        assert path.read_bytes() == whole


def test_cut_in_its_first_line_a_file_is_no_journal(tmp_path: Path) -> None:
    path = made(tmp_path / "journal.jsonl", 0)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"journal\.jsonl:1: .*begin a new run"):
            Journal.open(path)


@pytest.mark.parametrize("end", [b"\0\0\0\0", b"\0\0\n", b'{"s":[1,\n', b"\xff\xfe\n", b"[]\n"], ids=repr)
def test_a_garbled_last_line_is_cut_off_before_the_next_one(tmp_path: Path, end: bytes) -> None:
    path = made(tmp_path / "journal.jsonl", 2)
    whole = path.read_bytes()
    path.write_bytes(whole + end)
    Journal.open(path).finish()
    assert path.read_bytes() == whole + b'{"end":true}\n'


def test_opening_a_journal_changes_no_byte(tmp_path: Path) -> None:
    path = made(tmp_path / "journal.jsonl", 1)
    path.write_bytes(path.read_bytes() + b'{"s"')
    before = path.read_bytes()
    Journal.open(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "line", [b"garbage\n", b"\n", b'{"s":[1,\n', b"[" * 100_000 + b"\n"], ids=lambda it: repr(it[:9])
)
def test_garbage_in_the_middle_is_named_by_file_and_line(tmp_path: Path, line: bytes) -> None:
    path = made(tmp_path / "journal.jsonl", 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(StoreError, match=r"journal\.jsonl:3: expected .*begin a new run"):
        Journal.open(path)


BAD_LINES = {
    "no request": {"x": 1},
    "nothing": {},
    "no result": {"s": [1, "up", [1, 1, 1, 1, 1, False], [1], 1]},
    "two results": {"c": [1, [[1, 1, 1, 1, 1, 1, False]] * 2], "e": 1.0, "f": ["a", "b"]},
    "another projection": {"s": [1, "side", [1, 1, 1, 1, 1, False], [1], 1], "us": [[1.0]]},
    "text for a number": {"s": ["1", "up", [1, 1, 1, 1, 1, False], [1], 1], "us": [[1.0]]},
    "true for a number": {"s": [True, "up", [1, 1, 1, 1, 1, False], [1], 1], "us": [[1.0]]},
    "number for true": {"s": [1, "up", [1, 1, 1, 1, 1, 1], [1], 1], "us": [[1.0]]},
    "no groups": {"s": [1, "up", [1, 1, 1, 1, 1, False], [], 1], "us": []},
    "text for groups": {"s": [1, "up", [1, 1, 1, 1, 1, False], "1", 1], "us": [[1.0]]},
    "a negative number": {"s": [-1, "up", [1, 1, 1, 1, 1, False], [1], 1], "us": [[1.0]]},
    "a huge number": {"s": [10**400, "up", [1, 1, 1, 1, 1, False], [1], 1], "us": [[1.0]]},
    "a huge time": {"s": [1, "up", [1, 1, 1, 1, 1, False], [1], 1], "us": [[10**400]]},
    "a group without times": {"s": [1, "up", [1, 1, 1, 1, 1, False], [1, 8], 1], "us": [[1.0]]},
    "more samples than asked for": {"s": [1, "up", [1, 1, 1, 1, 1, False], [1], 1], "us": [[1.0, 1.0]]},
    "another word for infinite": {"s": [1, "up", [1, 1, 1, 1, 1, False], [1], 1], "us": [["Infinity"]]},
    "an object for a time": {"s": [1, "up", [1, 1, 1, 1, 1, False], [1], 1], "us": [[{}]]},
    "a short key": {"s": [1, "up", [1, 1, 1, 1, False], [1], 1], "us": [[1.0]]},
    "two BLOCK_SIZE_M": {"c": [1, [[16, 1, 1, 1, 1, 1, False], [64, 1, 1, 1, 1, 1, False]]], "e": 1.0},
    "half a pair": {"c": [1, [[16, 1, 1, 1, 1, 1, False]]], "e": 1.0},
    "an object for a pair": {"c": [1, {"up": 1, "down": 1}], "e": 1.0},
    "no error": {"c": [1, [[16, 1, 1, 1, 1, 1, False]] * 2], "e": None},
    "a round too few": {
        "r": [1, [[[1, 1, 1, 1, 1, 1, False]] * 2], 2, 0, 0],
        "us": [[1.0]],
        "n": 1,
        "why": None,
        "mhz": 1,
    },
    "true for an attempt": {"r": [1, [[[1, 1, 1, 1, 1, 1, False]] * 2], 1, True, 0], "f": ["a", "b"]},
    "false for an attempt": {"r": [1, [[[1, 1, 1, 1, 1, 1, False]] * 2], 1, False, 0], "f": ["a", "b"]},
    "data before the first": {"r": [1, [[[1, 1, 1, 1, 1, 1, False]] * 2], 1, 0, -1], "f": ["a", "b"]},
    "false for data": {"r": [1, [[[1, 1, 1, 1, 1, 1, False]] * 2], 1, 0, False], "f": ["a", "b"]},
    "no data": {"r": [1, [[[1, 1, 1, 1, 1, 1, False]] * 2], 1, 0], "f": ["a", "b"]},
    "no pairs": {"r": [1, [], 1, 0, 0], "us": [], "n": 1, "why": None, "mhz": None},
    "a number for a reason": {
        "r": [1, [[[1, 1, 1, 1, 1, 1, False]] * 2], 1, 0, 0],
        "us": [[1]],
        "n": 1,
        "why": 1,
        "mhz": 1,
    },
    "text for a clock": {
        "r": [1, [[[1, 1, 1, 1, 1, 1, False]] * 2], 1, 0, 0],
        "us": [[1]],
        "n": 1,
        "why": "",
        "mhz": "1",
    },
    "a failure without message": {"c": [1, [[1, 1, 1, 1, 1, 1, False]] * 2], "f": ["a"]},
    "a failure of numbers": {"c": [1, [[1, 1, 1, 1, 1, 1, False]] * 2], "f": [1, 2]},
}


@pytest.mark.parametrize("document", BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_that_means_no_answer_is_named_by_file_and_line(tmp_path: Path, document: object) -> None:
    path = made(tmp_path / "journal.jsonl", 1)
    with path.open("a") as file:
        file.write(f"{json.dumps(document)}\n")
    with pytest.raises(StoreError, match=r"journal\.jsonl:3: .*expected .*begin a new run"):
        Journal.open(path)


def test_a_time_too_large_for_a_float_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "journal.jsonl", 0)
    with path.open("a") as file:
        file.write('{"s":[1,"up",[1,1,1,1,1,false],[1],1],"us":[[1e999]]}\n')
    with pytest.raises(StoreError, match=r":2: expected a number"):
        Journal.open(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["up", "inf"]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from("srcefn"), inner, max_size=3),
    max_leaves=20,
)


@settings(max_examples=examples(300))
@given(json_values | st.dictionaries(st.sampled_from(["s", "r", "c", "us", "e", "f", "n", "why", "mhz"]), json_values))
def test_any_line_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, document: object) -> None:
    path = made(tmp_path_factory.mktemp("journal") / "journal.jsonl", 0)
    with path.open("a") as file:
        file.write(f"{json.dumps(document)}\n")
    try:
        journal_reader.read(path)
    except StoreError as error:
        assert f"{path}:2" in str(error)


@given(st.binary(max_size=60))
def test_a_file_of_any_bytes_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"journal\.jsonl:1: "):
        Journal.open(path)


@pytest.mark.parametrize(
    "header",
    ['{"format":2,"circumstances":{}}', '{"format":1}', '{"format":1,"circumstances":{"gpu":[]}}', "[]", "{}", "null"],
)
def test_another_first_line_is_refused_with_the_next_step(tmp_path: Path, header: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(f"{header}\n")
    with pytest.raises(StoreError, match=r"journal\.jsonl:1: .*expected .*begin a new run"):
        Journal.open(path)


def test_circumstances_survive(tmp_path: Path) -> None:
    path = made(tmp_path / "journal.jsonl", 0)
    assert journal_reader.difference(journal_reader.circumstances_of(path), CIRCUMSTANCES) is None


@pytest.mark.parametrize(("there", "now"), [(1, 2), (1, True), (1, "1"), (1, 1.0), (None, "nothing"), ("é", "e")])
def test_circumstances_that_look_alike_differ(there: Any, now: Any) -> None:
    said = journal_reader.difference({"gpu": "x", "seed": there}, {"gpu": "x", "seed": now})
    assert said == f"seed is {json.dumps(there)} there and {json.dumps(now)} now"


@pytest.mark.parametrize("value", [math.nan, math.inf, [], {}], ids=repr)
def test_circumstances_that_are_not_flat_are_refused_by_name(tmp_path: Path, value: Any) -> None:
    with pytest.raises(StoreError, match="circumstance skew"):
        Journal.create(tmp_path / "journal.jsonl", {"skew": value})


def test_a_journal_is_never_written_over(tmp_path: Path) -> None:
    path = made(tmp_path / "journal.jsonl", 1)
    with pytest.raises(StoreError, match="File exists"):
        Journal.create(path, CIRCUMSTANCES)
    assert len(results(path)) == 1


def test_a_closing_line_finishes_a_journal(tmp_path: Path) -> None:
    path = made(tmp_path / "journal.jsonl", 1)
    Journal.open(path).finish()
    assert (Journal.open(path).is_finished, journal_reader.is_finished(path)) == (True, True)


def test_a_journal_is_closed_once(tmp_path: Path) -> None:
    path = made(tmp_path / "journal.jsonl", 1)
    Journal.open(path).finish()
    before = path.read_bytes()
    Journal.open(path).finish()
    assert path.read_bytes() == before


def test_an_answer_after_the_closing_line_opens_the_journal_again(tmp_path: Path) -> None:
    path = made(tmp_path / "journal.jsonl", 1)
    Journal.open(path).finish()
    Journal.open(path).record(request(2), answer_of(request(2)))
    assert (Journal.open(path).is_finished, journal_reader.is_finished(path)) == (False, False)


def test_a_journal_that_was_opened_again_is_closed_again(tmp_path: Path) -> None:
    journal = Journal.open(made(tmp_path / "journal.jsonl", 1))
    journal.finish()
    journal.record(request(2), answer_of(request(2)))
    journal.finish()
    assert journal_reader.is_finished(tmp_path / "journal.jsonl")


def test_a_full_disk_is_refused_with_the_next_step() -> None:
    journal = Journal(Path("/dev/full"), journal_reader.Recording({}, {}, False, 0))
    with pytest.raises(StoreError, match=r"/dev/full: .*SGLANG_MOE_EXT_STORE"):
        journal.record(RACE, Failure("a", "b"))


def test_a_line_that_the_disk_took_in_part_is_cut_off_before_the_next_one(tmp_path: Path) -> None:
    path = made(tmp_path / "journal.jsonl", 2)
    whole, journal = path.read_bytes(), Journal.open(made(tmp_path / "cut.jsonl", 1))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) - 20, unlimited[1]))
    try:
        with pytest.raises(StoreError, match="File too large"):
            journal.record(request(2), answer_of(request(2)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert (tmp_path / "cut.jsonl").stat().st_size == len(whole) - 20
    journal.record(request(2), answer_of(request(2)))
    assert (tmp_path / "cut.jsonl").read_bytes() == whole


def test_an_answer_that_the_disk_refused_is_not_known(tmp_path: Path) -> None:
    journal = Journal.open(made(tmp_path / "journal.jsonl", 0))
    (tmp_path / "journal.jsonl").unlink()
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(StoreError):
        journal.record(RACE, Failure("a", "b"))
    assert journal.result(RACE) is None


def test_a_replayed_strategy_comes_to_the_same_result(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    result = halving(Journal.create(path, {}).through(answer_of), 64)
    assert halving(replay([path]), 64) == result


def test_a_packed_journal_is_replayed_as_well(tmp_path: Path) -> None:
    path = made(tmp_path / "journal.jsonl", 3)
    packed = tmp_path / "journal.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert replay([packed])(request(3)) == replay([path])(request(3))


def test_a_packed_journal_that_is_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    packed = tmp_path / "journal.jsonl.gz"
    packed.write_bytes(gzip.compress(made(tmp_path / "journal.jsonl", 300).read_bytes())[:-900])
    with pytest.raises(StoreError, match=r"journal\.jsonl\.gz"):
        replay([packed])


def test_a_packed_journal_is_not_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unpack"):
        Journal.open(tmp_path / "journal.jsonl.gz")


def test_of_two_journals_the_first_that_knows_answers(tmp_path: Path) -> None:
    one, two = (Journal.create(tmp_path / name, CIRCUMSTANCES) for name in ("one", "two"))
    one.record(CHECK, Accuracy(0.1))
    two.record(CHECK, Accuracy(0.2))
    two.record(RACE, answer_of(RACE))
    measure = replay([tmp_path / "one", tmp_path / "two"])
    assert (measure(CHECK), measure(RACE)) == (Accuracy(0.1), two.result(RACE))


def test_journals_of_different_circumstances_are_not_replayed_together(tmp_path: Path) -> None:
    Journal.create(tmp_path / "one", {"seed": 1})
    Journal.create(tmp_path / "two", {"seed": 2})
    with pytest.raises(StoreError, match=r"two cannot be replayed together .*seed"):
        replay([tmp_path / "one", tmp_path / "two"])


@pytest.mark.parametrize("kind", [LookupError, MoEExtError])
def test_a_replay_names_the_question_that_no_journal_answers(tmp_path: Path, kind: type[Exception]) -> None:
    measure = replay([made(tmp_path / "journal.jsonl", 1)])
    with pytest.raises(kind, match=r"journal\.jsonl.*tokens=2"):
        measure(request(2))
