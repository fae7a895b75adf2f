"""At which numbers of tokens our path is chosen, out of tables that may be of other layers, table_dirs, or broken."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext import env
from sglang_moe_ext.core import MoEShape, Quantization
from sglang_moe_ext.engines.sglang import table_names
from sglang_moe_ext.few_tokens_config import DownTile, FewTokensConfig, UpTile
from sglang_moe_ext.kernel_plans import DownConfig, KernelPlan, UpConfig, WarpSpecializedDown, WarpSpecializedUp
from sglang_moe_ext.kernels import warp_specialized_support
from sglang_moe_ext.serving import kernel_selection
from sglang_moe_ext.serving.table_search import TableDir
from sglang_moe_ext.serving.table_selection import SATURATED_TOKENS
from sglang_moe_ext.tables import plan_table
from sglang_moe_ext.tables.plan_table import KernelEntry, KernelTable
from tests.tables.generated import A_RUN

SHAPE = MoEShape(8, 128, 256, 2)
RUN = dataclasses.replace(A_RUN, shape=str(SHAPE))
DEVICE, TRITON = "NVIDIA H200", "3.6.0"


def path(block_m: int = 64) -> KernelPlan:
    return KernelPlan(UpConfig(block_m, 128, 64, 8, 8, 4), DownConfig(block_m, 128, 64, 8, 8, 4))


LONG = {"us": kernel_selection.SHORTEST_US}


def table(**by_tokens: KernelPlan | None) -> KernelTable:
    return {int(m[1:]): KernelEntry(found, RUN, LONG) for m, found in by_tokens.items()}


CASES = table(m256=None, m1024=path(64), m4096=path(128))


@pytest.mark.parametrize(
    ("tokens", "block_m"),
    [(1, None), (256, None), (700, None), (1023, None), (1024, 64), (2560, 64), (2561, 128), (4096, 128), (9999, 128)],
)
def test_our_path_runs_between_numbers_of_tokens_that_it_won(tokens: int, block_m: int | None) -> None:
    found = kernel_selection.select_plan(CASES, tokens)
    assert (found and found.block_m) == block_m


def test_it_does_not_run_behind_the_last_number_where_more_tokens_change_the_tiles() -> None:
    assert kernel_selection.select_plan(table(m256=path(), m1024=path()), 1025) is None


def test_it_does_not_run_below_the_first_number() -> None:
    assert kernel_selection.select_plan(table(m1024=path()), 1023) is None


@given(st.dictionaries(st.integers(1, 20000), st.none() | st.builds(path), max_size=6), st.integers(1, 40000))
def test_a_path_is_chosen_only_where_no_neighbour_lost(by_tokens: dict[int, KernelPlan | None], tokens: int) -> None:
    found = kernel_selection.select_plan({m: KernelEntry(it, RUN) for m, it in by_tokens.items()}, tokens)
    below = [m for m in by_tokens if m <= tokens]
    above = [m for m in by_tokens if m >= tokens]
    lost_below = not below or by_tokens[max(below)] is None
    lost_above = by_tokens[min(above)] is None if above else max(below, default=0) < SATURATED_TOKENS
    assert (found is not None) == (not lost_below and not lost_above)


def table_dirs(tmp_path: Path) -> list[TableDir]:
    return [TableDir("your", tmp_path / "yours"), TableDir("the shipped", tmp_path / "shipped")]


def write(table_dir: TableDir, entries: KernelTable, *, triton: str = TRITON, device: str = DEVICE) -> Path:
    table_file = table_names.file_name(table_names.table_key(SHAPE, device))
    file = plan_table.path_beside(table_dir.root / table_names.version_folder(triton) / table_file)
    plan_table.put(file, entries)
    return file


def test_what_the_user_measured_stands_before_what_is_shipped(tmp_path: Path) -> None:
    yours, shipped = table_dirs(tmp_path)
    write(shipped, table(m1024=path(64), m4096=path(64)))
    write(yours, table(m1024=None))
    found = kernel_selection.load_plans(SHAPE, DEVICE, TRITON, [yours, shipped])
    assert {m: entry.plan for m, entry in found.items()} == {1024: None, 4096: path(64)}


@pytest.mark.parametrize("other", [{"triton": "3.5.1"}, {"device": "NVIDIA H100"}], ids=["Triton", "GPU"])
def test_nothing_is_taken_over_from_another(other: dict[str, str], tmp_path: Path) -> None:
    write(table_dirs(tmp_path)[0], CASES, **other)
    assert kernel_selection.load_plans(SHAPE, DEVICE, TRITON, table_dirs(tmp_path)) == {}


@pytest.mark.parametrize("name", ["hidden_size", "top_k"])
def test_entries_of_a_layer_that_only_shares_the_name_of_the_file_are_passed_over(name: str, tmp_path: Path) -> None:
    write(table_dirs(tmp_path)[0], CASES)
    unlike = dataclasses.replace(SHAPE, **{name: 4})
    assert kernel_selection.load_plans(unlike, DEVICE, TRITON, table_dirs(tmp_path)) == {}


SHORTEST = kernel_selection.SHORTEST_US


@pytest.mark.parametrize("figures", [{"us": SHORTEST - 1}, {}], ids=["short", "nobody knows"])
def test_a_layer_that_is_shorter_than_what_it_costs_the_host_is_left_to_the_engine(figures: dict[str, float]) -> None:
    entries = {1024: KernelEntry(path(), RUN, figures), 4096: KernelEntry(path(), RUN, LONG)}
    found = kernel_selection.drop_short(entries)
    assert {m: entry.plan for m, entry in found.items()} == {1024: None, 4096: path()}


@pytest.mark.parametrize(("incumbent_us", "runs"), [(SHORTEST - 1, False), (SHORTEST, True), (SHORTEST + 1, True)])
def test_a_plan_is_not_given_up_for_being_fast(incumbent_us: float, runs: bool) -> None:
    """The engine's layer says how long the host has; ours may take less than the host needs."""
    found = kernel_selection.drop_short(
        {4096: KernelEntry(path(), RUN, {"us": SHORTEST - 90, "incumbent_us": incumbent_us})}
    )
    assert (found[4096].plan is not None) == runs


def test_a_broken_table_is_passed_over_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    yours, shipped = table_dirs(tmp_path)
    write(shipped, CASES)
    write(yours, CASES).write_text('{"format": 1, "runs": [', encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert kernel_selection.load_plans(SHAPE, DEVICE, TRITON, [yours, shipped]) == CASES
    assert "passes over a table of kernel plans" in caplog.text


FEW = FewTokensConfig(UpTile(1, 16, 256, 4, 3), DownTile(1, 16, 256, 4, 4))
GROUPED = FewTokensConfig(UpTile(16, 32, 128, 4, 4), DownTile(16, 64, 128, 4, 4), grouped=True)
SMALL = {
    m: KernelEntry(it, RUN, {"us": 40.0})
    for m, it in {1: FEW, 2: None, 4: FEW, 8: GROUPED, 32: FEW, 512: path()}.items()
}


@pytest.mark.parametrize(
    ("tokens", "plan"),
    [(1, FEW), (2, None), (3, None), (4, FEW), (6, FEW), (7, GROUPED), (16, GROUPED), (17, FEW), (32, FEW), (33, None)],
)
def test_a_plan_for_few_tokens_runs_between_its_own_kind_where_its_rules_allow(
    tokens: int, plan: FewTokensConfig | None
) -> None:
    """Behind the last of its kind tiles behind a sort may follow, and nothing is known of what lies between."""
    assert kernel_selection.select_plan(SMALL, tokens, SHAPE) == plan


def test_a_plan_for_few_tokens_runs_outside_of_graphs_too_and_on_gpus_before_hopper(
    caplog: pytest.LogCaptureFixture,
) -> None:
    entries = {1: SMALL[1], 1024: KernelEntry(path(), RUN, LONG)}
    assert kernel_selection.drop_short(entries) == entries
    with caplog.at_level(logging.WARNING):
        found = kernel_selection.drop_unsupported(entries, SHAPE, 86, TRITON)
    assert {m: entry.plan for m, entry in found.items()} == {1: FEW, 1024: None}
    assert "M=1024: those behind its sort are for sm_90" in caplog.text


GLUON = KernelPlan(WarpSpecializedUp(), DownConfig(64, 128, 64, 8, 4, 4))
MIXED = table(m1024=path(64), m2048=GLUON, m4096=KernelPlan(UpConfig(128, 128, 64, 8, 8, 4), WarpSpecializedDown()))


def kept(sm: int = 90, triton: str = TRITON, shape: MoEShape = SHAPE) -> dict[int, bool]:
    """Whether each M of MIXED still has a plan."""
    found = kernel_selection.drop_unsupported(MIXED, shape, sm, triton)
    return {m: entry.plan is not None for m, entry in found.items()}


def test_warp_specialized_plans_run_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warp_specialized_support, "why_not_importable", lambda: None)
    assert kept() == {1024: True, 2048: True, 4096: True}


@pytest.mark.parametrize(("sm", "triton"), [(100, "3.6.0"), (90, "3.5.1"), (90, "3.9.0"), (90, "nightly")])
def test_warp_specialized_plans_are_the_engines_elsewhere_and_a_line_says_why(
    sm: int, triton: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert kept(sm, triton) == {1024: True, 2048: False, 4096: False}
    assert len(caplog.messages) == 1
    assert "M=2048, 4096: the warp-specialized kernels" in caplog.text


def test_warp_specialized_plans_are_the_engines_where_gluon_does_not_import(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warp_specialized_support, "why_not_importable", lambda: "Gluon cannot be imported: gone")
    with caplog.at_level(logging.WARNING):
        assert kept() == {1024: True, 2048: False, 4096: False}
    assert "Gluon cannot be imported: gone" in caplog.text


def test_no_plan_runs_for_a_layer_that_our_kernels_cannot_do(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not any(kept(shape=dataclasses.replace(SHAPE, quantization=Quantization("int8_w8a8"))).values())
    assert "they multiply 16 bits" in caplog.text


def test_a_plan_of_a_later_version_is_the_engines_and_a_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of_later = '{"up": {"kernel": "cluster_up"}, "down": {"kernel": "cluster_down"}}'
    entries = {1024: KernelEntry(path(), RUN, LONG), 4096: KernelEntry(None, RUN, LONG, of_later)}
    write(table_dirs(tmp_path)[0], entries)
    with caplog.at_level(logging.WARNING):
        found = kernel_selection.load_plans(SHAPE, DEVICE, TRITON, table_dirs(tmp_path))
    assert {m: entry.plan for m, entry in found.items()} == {1024: path(), 4096: None}
    assert [line for line in caplog.messages if "of a later version" in line and "M=4096" in line] == caplog.messages


@pytest.mark.parametrize(("value", "is_on"), [(None, True), ("1", True), ("0", False)])
def test_a_variable_leaves_the_kernels_to_the_engine(
    value: str | None, is_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(env.KERNELS, raising=False)
    if value is not None:
        monkeypatch.setenv(env.KERNELS, value)
    assert kernel_selection.is_on() == is_on
