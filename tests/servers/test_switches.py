"""Real servers that are not as usual: our plugin is kept out, its table is broken, its startup file is gone."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from sglang_moe_ext.engines import config_dict
from tests.engines.fork_server import ForkServer
from tests.servers import runs, stand_in_tuner, tables
from tests.servers import server as servers
from tests.servers.runs import Run
from tests.servers.server import Site

VERSION = "0.5.23"


def configs(run: Run) -> set[tuple[str, tuple[tuple[str, int], ...]]]:
    """What it launched, of each GEMM."""
    return {(launch.gemm, tuple(launch.config.items())) for launch in run.launches}


@dataclass(frozen=True, slots=True)
class Two:
    """`others`: SGLANG_PLUGINS names somebody else's plugin; `broken`: the table in the store is cut off."""

    others: Run
    broken: Run
    table: Path


@pytest.fixture(scope="module")
def two(forked_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Two:
    good, bad = (tmp_path_factory.mktemp(name) for name in ("good", "bad"))
    text = tables.put(good).read_text()
    table = tables.put(bad, text[: len(text) // 2])
    others = {"SGLANG_MOE_EXT_STORE": str(good), "SGLANG_PLUGINS": "moe_on_cpu"}
    broken = {"SGLANG_MOE_EXT_STORE": str(bad)}
    return Two(*runs.of_each(VERSION, (forked_site, others), (forked_site, broken)), table)


@pytest.fixture(scope="module")
def bare(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of a server in whose environment no startup file is run, as where a wheel was unpacked and not installed.

    Its store is empty: what tunes before it loads is stood for, since there is no GPU, and writes the table.
    """
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(site.folder / "venv", folder / "venv", symlinks=True)
    (startup_file,) = folder.glob("venv/lib/python*/site-packages/sglang_moe_ext_startup.pth")
    startup_file.unlink()
    there = dataclasses.replace(site, python=folder / "venv" / "bin" / "python", folder=folder)
    # No startup file is run where it begins, nor where it forks the server's processes.
    fork_server = ForkServer(servers.environment(there, None), there.python)
    try:
        forked = dataclasses.replace(there, python=fork_server.python)
        (run,) = runs.of_each(VERSION, (forked, stand_in_tuner.settings(folder)))
    finally:
        fork_server.close()
    return run


def test_the_entry_point_is_enough(bare: Run) -> None:
    assert bare.launches
    assert [launch for launch in bare.launches if launch.config != config_dict.config_dict_of(tables.OURS)] == []


def test_the_first_start_tunes_and_the_log_says_so_once(bare: Run) -> None:
    (line,) = bare.lines("sglang-moe-ext: tuned 2 batch sizes")
    assert "NVIDIA_H200.json" in line


def test_the_log_says_that_the_entry_point_brought_us_in(bare: Run) -> None:
    (line,) = bare.lines("sglang-moe-ext", "is active")
    assert "by the entry point" in line


def test_plugins_without_our_name_keep_us_out(two: Two) -> None:
    assert two.others.launches
    assert [launch for launch in two.others.launches if launch.config == config_dict.config_dict_of(tables.OURS)] == []


def test_kept_out_we_do_not_say_that_we_are_active(two: Two) -> None:
    assert two.others.lines("sglang-moe-ext", "is active") == []


def test_a_broken_table_leaves_the_engines_default(two: Two) -> None:
    assert configs(two.broken) == configs(two.others)


def test_a_broken_table_changes_no_token(two: Two) -> None:
    assert two.broken.tokens == two.others.tokens


def test_a_broken_table_is_said_once(two: Two) -> None:
    (line,) = two.broken.lines(str(two.table))
    assert "passes over" in line
