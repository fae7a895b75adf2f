"""The proof of a pick-up, on engines that are tables: what it takes for one, and what it does not blame on a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_moe_ext.core import EngineError, Table, TileConfig
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.tables import config_table
from sglang_moe_ext.tuning import verify_install
from sglang_moe_ext.tuning.incumbents import pairs_of
from sglang_moe_ext.tuning.verify_install import WrittenTables
from tests.tuning.recorded_runs import request_of

ONE, OTHER = TileConfig(64, 128, 64, 1, 4, 3), TileConfig(16, 64, 64, 1, 4, 3)
FOLDER, STORE = Path("/engine/configs/triton_3_6_0"), Path("/store/tables/sglang/triton_3_6_0")
UP, DOWN, COPY = FOLDER / "E=65.json", FOLDER / "E=65_down.json", STORE / "E=65.json"
REQUEST = request_of("glm_4_7_flash_bf16", (64, 4096))
PREDICTING = replace(REQUEST, measuring=None)


class Engine:
    """An engine that takes the nearest entry of the table that `table` gives."""

    def __init__(self, table: Callable[[], Table], files: tuple[Path, ...], plugin: str | None) -> None:
        self.table, self.files, self.plugin, self.asked = table, files, plugin, 0

    def answer(self, request: LookupRequest) -> LookupResult:
        self.asked += 1
        table = self.table()
        taken = {m: table[config_table.nearest(table, m)] for m in request.tokens}
        down: dict[int, TileConfig | None] = dict(taken)
        return LookupResult("0.5.23", "3.6.0", "NVIDIA H200", taken, down, self.files, (), plugin=self.plugin)

    def close(self) -> None:
        """Nothing runs."""


def written(table: Table) -> WrittenTables:
    return WrittenTables(table, UP, table, DOWN)


def verify(engine: Engine, table: Table, on_disk: Table, request: object = REQUEST) -> LookupResult:
    return verify_install.verify(written(table), lambda: written(on_disk), COPY, request, engine)  # type: ignore[arg-type]


MINE = {64: ONE, 4096: ONE}


@pytest.mark.parametrize(
    ("files", "plugin"), [((UP, DOWN), None), ((COPY,), "active"), ((UP, DOWN), "off: it is switched off")], ids=str
)
def test_a_table_that_is_taken_is_picked_up(files: tuple[Path, ...], plugin: str | None) -> None:
    answer = verify(Engine(lambda: MINE, files, plugin), MINE, MINE)
    assert verify_install.is_served(answer) == (plugin == "active")


@pytest.mark.parametrize("plugin", [None, "active"])
def test_another_entry_than_the_written_one_is_an_error(plugin: str | None) -> None:
    engine = Engine(lambda: {64: ONE, 4096: OTHER}, (UP, DOWN), plugin)
    with pytest.raises(EngineError, match="at M=4096: the written table has"):
        verify(engine, MINE, MINE)
    assert engine.asked == 1


@pytest.mark.parametrize("plugin", [None, "active"])
def test_what_another_run_wrote_meanwhile_is_not_blamed_on_this_one(plugin: str | None) -> None:
    theirs = {64: ONE, 4096: OTHER}
    engine = Engine(lambda: theirs, (UP, DOWN), plugin)
    verify(engine, MINE, theirs)
    assert engine.asked == 2


@pytest.mark.parametrize("plugin", [None, "active"])
def test_a_table_that_is_not_read_is_an_error(plugin: str | None) -> None:
    with pytest.raises(EngineError, match=r"did not read .*E=65.json, now written: it read no table at all"):
        verify(Engine(lambda: MINE, (), plugin), MINE, MINE)


def test_with_our_hooks_a_measured_table_before_a_predicted_one_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Path("/shipped/E=65.json")
    engine = Engine(lambda: {64: OTHER}, (shipped,), "active")
    monkeypatch.setattr(verify_install.known_tables, "find_measured", lambda problem: ("shipped", shipped))
    assert verify(engine, MINE, MINE, PREDICTING).files == (shipped,)
    with pytest.raises(EngineError):
        verify(engine, MINE, MINE, REQUEST)


def test_far_from_an_entry_our_hooks_may_leave_the_default() -> None:
    engine = Engine(lambda: {3: OTHER, **MINE}, (COPY,), "active")
    verify(engine, MINE, MINE)


def test_without_a_down_table_both_gemms_run_the_up_entry_without_tma() -> None:
    with_tma = replace(ONE, use_tma=True)
    answer = LookupResult("0", "3.6.0", "GPU", {64: with_tma}, {64: None}, (), ())
    assert pairs_of(answer) == {64: {"up": with_tma, "down": ONE}}
