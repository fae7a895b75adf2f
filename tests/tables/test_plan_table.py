"""Tables of paths: what is written is read again, what is broken is refused, and no engine takes one for a table."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import TableError, TileConfig
from sglang_moe_ext.few_tokens_config import DownTile, FewTokensConfig, UpTile
from sglang_moe_ext.kernel_plans import DownConfig, KernelPlan, Plan, UpConfig, WarpSpecializedDown, WarpSpecializedUp
from sglang_moe_ext.tables import config_table, plan_table
from sglang_moe_ext.tables.plan_table import KernelEntry
from sglang_moe_ext.tables.provenance import TuningRun
from tests.tables.generated import paths, plans_for_few_tokens

RUN = TuningRun(
    "2026-11-21", "tune", "m", "E=8,N=128,K=256,topk=2", "H200", "k", "sglang 0.5.15", "3.6.0", None, None, 0, "1"
)
UP = UpConfig(128, 128, 64, 8, 8, 4)
DOWN = DownConfig(64, 256, 64, 8, 8, 4, half_stores=True)
PATH = KernelPlan(UP, DOWN)

entries = st.builds(KernelEntry, st.none() | paths | plans_for_few_tokens, st.just(RUN), st.just({"us": 1.5}))


@given(st.dictionaries(st.integers(1, 1 << 20), entries))
def test_what_is_written_is_read_again(table: plan_table.KernelTable) -> None:
    assert plan_table.parse(json.loads(plan_table.to_json(table))) == table


def test_entries_of_other_numbers_of_tokens_stay(tmp_path: Path) -> None:
    file = tmp_path / "E=8.paths.json"
    plan_table.put(file, {64: KernelEntry(None, RUN), 4096: KernelEntry(None, RUN)})
    plan_table.put(file, {4096: KernelEntry(PATH, RUN)})
    assert {m: entry.plan for m, entry in plan_table.read(file).items()} == {64: None, 4096: PATH}


def test_a_layer_without_a_file_has_no_paths(tmp_path: Path) -> None:
    assert plan_table.read(tmp_path / "none.paths.json") == {}


GLUON = KernelPlan(WarpSpecializedUp(), WarpSpecializedDown("pair", stages=3))


@pytest.mark.parametrize(
    ("half", "new"),
    [
        ("up", {"stages": 1}),
        ("up", {"stages": 5}),
        ("up", {"stages": True}),
        ("up", {"persistent": 1}),
        ("up", {"group_m": 0}),
        ("up", {"block_m": 128}),
        ("down", {"form": "narrow"}),
        ("down", {"form": ["wide"]}),
        ("down", {"form": None}),
        ("down", {"stages": 1}),
    ],
    ids=str,
)
def test_a_warp_specialized_plan_that_could_hang_or_not_compile_is_refused(half: str, new: dict[str, Any]) -> None:
    document = plan_table.document_of(GLUON)
    document[half] |= new
    with pytest.raises(TableError):
        plan_table.parse_plan(document)


def of_a_later_version(half: str) -> dict[str, Any]:
    """A table with a plan that this version knows, at 64, and one that it does not, at 4096."""
    document: dict[str, Any] = json.loads(
        plan_table.to_json({m: KernelEntry(GLUON, RUN, {"us": 1.5}) for m in (64, 4096)})
    )
    document["entries"]["4096"]["path"][half] = {"kernel": "cluster_gemm", "cluster": [2, 1]}
    return document


@pytest.mark.parametrize("half", ["up", "down"])
def test_a_kernel_of_a_later_version_costs_its_own_entry_alone(half: str) -> None:
    table = plan_table.parse(of_a_later_version(half))
    assert {m: entry.plan for m, entry in table.items()} == {64: GLUON, 4096: None}
    assert [m for m, entry in table.items() if entry.of_later] == [4096]


@pytest.mark.parametrize("half", ["up", "down"])
def test_a_plan_of_a_later_version_stays_in_the_file_when_others_are_written(half: str, tmp_path: Path) -> None:
    file, later = tmp_path / "E=8.paths.json", of_a_later_version(half)
    file.write_text(json.dumps(later))
    plan_table.put(file, {64: KernelEntry(None, RUN)})
    assert json.loads(file.read_text())["entries"]["4096"] == later["entries"]["4096"]


FEW = FewTokensConfig(UpTile(8, 64, 128, 4, 4), DownTile(8, 128, 128, 4, 4, split=8, prefetched=1), wide_range=True)


def test_a_plan_for_few_tokens_names_kernels_that_an_older_version_does_not_know_and_keeps() -> None:
    """It reads an up and a down of a kernel each, and takes a well-formed name that is new to it for a later one."""
    document = plan_table.document_of(FEW)
    assert document.keys() == {"up", "down"}
    assert (document["up"]["kernel"], document["down"]["kernel"]) == ("few_tokens_up", "few_tokens_down")
    assert plan_table.parse_plan(document) == FEW


@pytest.mark.parametrize("of", [GLUON, FEW], ids=str)
@pytest.mark.parametrize("half", ["up", "down"])
def test_a_field_that_only_a_later_version_knows_costs_its_own_entry_alone(half: str, of: Plan) -> None:
    document = json.loads(plan_table.to_json({m: KernelEntry(of, RUN) for m in (1, 4)}))
    document["entries"]["4"]["path"][half]["cluster"] = 2
    table = plan_table.parse(document)
    assert {m: entry.plan for m, entry in table.items()} == {1: of, 4: None}
    assert json.loads(plan_table.to_json(table)) == document


@pytest.mark.parametrize(
    ("half", "new"),
    [
        ("up", {"rows": 3}),
        ("up", {"rows": True}),
        ("up", {"grouped": 1}),
        ("up", {"num_stages": 7}),
        ("down", {"split": 5}),
        ("down", {"prefetched": -1}),
        ("down", {"columns": 256}),
        ("down", {"columns": "64"}),
    ],
    ids=str,
)
def test_a_plan_for_few_tokens_of_sizes_that_were_not_tried_is_refused(half: str, new: dict[str, Any]) -> None:
    document = plan_table.document_of(FEW)
    document[half] |= new
    with pytest.raises(TableError):
        plan_table.parse_plan(document)


def test_the_tables_of_earlier_versions_are_still_read() -> None:
    up = {
        "kernel": "sorted_up", "block_m": 64, "block_n": 128, "block_k": 128, "group_m": 32, "num_warps": 8,
        "num_stages": 3, "persistent": True, "programs_per_sm": 1, "is_fused": True, "half_stores": False,
    }  # fmt: skip
    down = {
        "kernel": "short_down", "block_m": 64, "block_n": 64, "block_k": 128, "tiles_per_program": 28, "num_warps": 4,
        "num_stages": 3,
    }  # fmt: skip
    plan = plan_table.parse_plan({"up": up, "down": down})
    assert plan_table.document_of(plan) == {"up": up, "down": down}


def changed(**new: Any) -> dict[str, Any]:
    document = plan_table.document_of(PATH)
    document["up"] |= new
    return document


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"up": 1, "down": 2},
        changed(kernel="fused_moe"),
        changed(block_n=96),
        changed(block_m=32),
        changed(num_stages=0),
        changed(num_stages=True),
        changed(is_fused=1),
        changed(cluster=2),
        changed(group_m=10**9),
        changed(num_warps=12),
        changed(num_stages=64),
    ],
    ids=str,
)
def test_what_is_no_path_is_refused(document: Any) -> None:
    with pytest.raises(TableError):
        plan_table.parse_plan(document)


def test_an_up_gemm_of_the_engine_that_asks_for_tma_is_refused() -> None:
    with pytest.raises(TableError, match="without"):
        plan_table.parse_plan(plan_table.document_of(replace(PATH, up=TileConfig(128, 64, 64, 1, 4, 3, True))))


@pytest.mark.parametrize(("key", "run"), [("0", 0), ("-4", 0), ("1_0", 0), ("64", -1), ("64", 1)], ids=str)
def test_entries_without_a_number_of_tokens_or_a_run_are_refused(key: str, run: int) -> None:
    document = json.loads(plan_table.to_json({64: KernelEntry(PATH, RUN)}))
    document["entries"] = {key: {**document["entries"]["64"], "run": run}}
    with pytest.raises(TableError):
        plan_table.parse(document)


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "E=8.paths.json"
    whole = plan_table.to_json({4096: KernelEntry(PATH, RUN, {"us": 1.0})}).rstrip()
    for length in range(0, len(whole), 7):
        file.write_text(whole[:length])
        with pytest.raises(TableError, match=r"E=8\.paths\.json"):
            plan_table.read(file)


def test_an_engine_would_not_take_it_for_a_table(tmp_path: Path) -> None:
    file = tmp_path / "E=8.paths.json"
    plan_table.put(file, {4096: KernelEntry(PATH, RUN)})
    with pytest.raises(TableError):
        config_table.read(file)


def test_the_blocks_of_a_path_are_those_of_its_up_gemm() -> None:
    assert replace(PATH, up=TileConfig(64, 64, 64, 1, 4, 3)).block_m == 64
