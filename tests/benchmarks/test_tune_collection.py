"""Working through a list of layers, and what of it ships. There is no GPU, so shipped tables stand for tuned ones."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import tune_collection
from benchmarks.collection import archive, page, rows, shipping
from benchmarks.collection.rows import Row
from benchmarks.tune_collection import TUNED_CONFIGS, Collection, Result
from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.tables import config_table, plan_table, provenance

LIST = """
--model GLM-4.7-Flash          # a comment
--model Qwen3-30B-A3B
--model Qwen3-VL-30B-A3B
--model GLM-4.7-Flash --engine vllm
"""
SHIPPED = {
    "GLM-4.7-Flash": "E=65,N=1536,device_name=NVIDIA_H200",
    "Qwen3-30B-A3B": "E=128,N=768,device_name=NVIDIA_H200",
}


def named(row: Row) -> str:
    return rows.describe_launches(row.launches[:1]).split()[0]


def copies_what_ships(row: Row, store: Path, gpu: str, limit_s: float) -> Result:
    """In the place of `tune`."""
    engine, stem = row.engine, SHIPPED[named(row)]
    source = TUNED_CONFIGS / shipping.SHIPPED[engine] / "triton_3_6_0"
    folder = store / "tables" / engine / "triton_3_6_0"
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.name.startswith((f"{stem}.", f"{stem}_down.", stem.replace("E=65", "E=64") + ".")):
            shutil.copy(file, folder)
    return Result(row.slug, engine, str(row.shape), row.launches, 1.0)


def fails(row: Row, store: Path, gpu: str, limit_s: float) -> Result:
    return Result(row.slug, row.engine, str(row.shape), row.launches, 1.0, "no such GPU")


def test_lines_with_one_layer_are_one_row() -> None:
    found = rows.parse(LIST)
    assert [rows.describe_launches(row.launches) for row in found] == [
        "GLM-4.7-Flash TP 1",
        "Qwen3-30B-A3B TP 1, Qwen3-VL-30B-A3B TP 1",
        "GLM-4.7-Flash TP 1",
    ]
    assert len({row.slug for row in found}) == 3


@pytest.mark.parametrize(
    "line", ["--model NoSuchModel-7B", "--tp-size 2", "--model GLM-4.7-Flash --effort full", "--model '"]
)
def test_a_wrong_line_is_named(line: str) -> None:
    with pytest.raises(MoEExtError, match="line 2"):
        rows.parse(f"--model GLM-4.7-Flash\n{line}\n")


@pytest.mark.parametrize("name", ["h100.txt"])
def test_the_lists_here_are_sound(name: str) -> None:
    text = (Path(rows.__file__).parent / name).read_text(encoding="utf-8")
    assert len(rows.parse(text)) >= 24


def test_a_row_that_ended_well_is_not_tuned_again_and_a_failed_one_is(tmp_path: Path) -> None:
    wanted, tuned = rows.parse(LIST), list[str]()

    def noting(tune: Callable[[Row, Path, str, float], Result]) -> Callable[[Row, Path, str, float], Result]:
        def tune_row(row: Row, store: Path, gpu: str, limit_s: float) -> Result:
            tuned.append(row.slug)
            return tune(row, store, gpu, limit_s)

        return tune_row

    Collection(tmp_path, 3600, noting(copies_what_ships)).run(wanted[:1], ["0"])
    Collection(tmp_path, 3600, noting(fails)).run(wanted[:2], ["0"])
    results = Collection(tmp_path, 3600, noting(copies_what_ships)).run(wanted[:2], ["0"])
    assert tuned == [wanted[0].slug, wanted[1].slug, wanted[1].slug]
    assert [results[row.slug].why for row in wanted[:2]] == [None, None]


def test_no_row_is_begun_that_would_not_end_in_time(tmp_path: Path) -> None:
    assert Collection(tmp_path, 5, copies_what_ships).run(rows.parse(LIST), ["0"]) == {}


def test_several_gpus_share_the_rows(tmp_path: Path) -> None:
    results = Collection(tmp_path, 3600, copies_what_ships).run(rows.parse(LIST), ["0", "1", "2"])
    assert len(results) == 3


def test_a_line_that_a_kill_cut_off_counts_for_nothing(tmp_path: Path) -> None:
    Collection(tmp_path, 3600, copies_what_ships).run(rows.parse(LIST), ["0"])
    with (tmp_path / archive.RESULTS).open("a") as lines:
        lines.write('{"slug": "a", "engi')
    assert len(tune_collection.read_results(tmp_path)) == 3


@pytest.fixture
def collected(tmp_path: Path) -> Path:
    """Of `LIST`, carried to a machine where the stores are not."""
    Collection(tmp_path / "there", 3600, copies_what_ships).run(rows.parse(LIST), ["0"])
    (tmp_path / "home").mkdir()
    for name in (archive.RESULTS, archive.TABLES, archive.JOURNALS):
        shutil.copy(tmp_path / "there" / name, tmp_path / "home")
    return tmp_path / "home"


def test_what_is_collected_is_what_was_tuned(collected: Path, tmp_path: Path) -> None:
    unshipped = tune_collection.collect([collected], tmp_path / "tuned")
    assert unshipped == []
    for name in SHIPPED.values():
        ours, theirs = (it / "configs/triton_3_6_0" / f"{name}.json" for it in (tmp_path / "tuned", TUNED_CONFIGS))
        assert config_table.read(ours) == config_table.read(theirs)
        assert provenance.read(ours) == provenance.read(theirs)
        assert plan_table.read(plan_table.path_beside(ours)) == plan_table.read(plan_table.path_beside(theirs))
        assert ours.with_name(f"{name}_down.json").exists()
    assert (tmp_path / "tuned/vllm/triton_3_6_0/E=64,N=1536,device_name=NVIDIA_H200.json").exists()


def test_a_row_without_a_gain_ships_nothing_and_is_on_the_page(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "LEAST_GAIN", 99.0)
    unshipped = tune_collection.collect([collected], tmp_path / "tuned")
    assert len(unshipped) == 3
    assert not list(tmp_path.glob("tuned/**/*.json"))
    assert "Qwen3-30B-A3B TP 1, Qwen3-VL-30B-A3B TP 1" in page.write(tmp_path / "tuned", unshipped)


def test_a_table_of_another_layer_under_the_same_name_stays(collected: Path, tmp_path: Path) -> None:
    tune_collection.collect([collected], tmp_path / "tuned")
    table = tmp_path / "tuned/configs/triton_3_6_0" / f"{SHIPPED['Qwen3-30B-A3B']}.json"
    beside = provenance.sidecar(table)
    beside.write_text(beside.read_text(encoding="utf-8").replace("K=2048", "K=4096"), encoding="utf-8")
    before = table.read_bytes()
    (why,) = [it.why for it in tune_collection.collect([collected], tmp_path / "tuned")]
    assert "another layer, E=128,N=768,K=4096,topk=8,dtype=bfloat16" in why
    assert table.read_bytes() == before


@pytest.mark.parametrize("name", ["../out", "/etc/out", "elsewhere/out"])
def test_a_hostile_archive_writes_nothing(name: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "it.tar.xz", "w:xz") as packed:
        packed.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(MoEExtError, match="expected files below rows/"):
        archive.unpack(tmp_path / "it.tar.xz", tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_an_archive_that_is_cut_off_is_one_line(
    collected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = collected / archive.TABLES
    file.write_bytes(file.read_bytes()[:-200])
    status = tune_collection.main(
        ["--collect", str(collected), "--into", str(tmp_path / "t"), "--page", str(tmp_path / "p")]
    )
    assert status == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_page_is_that_of_what_ships() -> None:
    """Each shipped table has its row, with the gains that its provenance has; `--collect` writes the page."""
    text = tune_collection.PAGE.read_text(encoding="utf-8")
    for line in page.write(TUNED_CONFIGS, []).splitlines():
        assert line in text


def test_a_gain_counts_our_kernels_over_what_ran_before() -> None:
    table = TUNED_CONFIGS / "configs/triton_3_6_0" / f"{SHIPPED['Qwen3-30B-A3B']}.json"
    plans = json.loads(plan_table.path_beside(table).read_text(encoding="utf-8"))["entries"]
    known = provenance.read(table)
    assert known is not None
    found = shipping.gains(table)
    for m, gain in found.items():
        won = plans.get(str(m), {"path": None})["path"] is not None
        assert gain.is_ours == won
        assert gain.value == pytest.approx(
            known.entries[m].figures["gain"] * (plans[str(m)]["figures"]["gain"] if won else 1)
        )
