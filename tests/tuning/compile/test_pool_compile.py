"""The compile pool: what one binary does to its compiler costs that binary alone, and nothing is compiled twice.

The kernel of these tests is `fake_kernel`: it stands for crashes, hangs and errors that the real compiler does not do
on demand. What the real compiler makes of real kernels is in tests/engines/sglang/test_compile.py.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from sglang_moe_ext.core import CompileJob, CompileKey, Failure, MoEShape, Resources, Target
from sglang_moe_ext.tuning.compile.cache import CompileCache
from sglang_moe_ext.tuning.compile.kernel_source import Compiled, KernelSource
from sglang_moe_ext.tuning.compile.pool import compile_all
from tests.tuning import fake_kernel
from tests.tuning.fake_kernel import EXITS, FINE, OUT_OF_MEMORY, RAISES, REFUSED, SEGFAULTS

SOURCE = KernelSource("fake", "tests.tuning.fake_kernel", "1", False)
MISHAPS = {"crash": EXITS, "segfault": SEGFAULTS, "error": RAISES, "out of memory": OUT_OF_MEMORY}


@pytest.fixture(autouse=True)
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv(fake_kernel.LOG, str(path))
    return path


def compilations(log: Path) -> int:
    return len(log.read_text().splitlines())


def job(block_n: int, does: int = FINE) -> CompileJob:
    return CompileJob(MoEShape(8, 64, 64, 2), "up", 64, CompileKey(16, block_n, does, 4, 2), Target(90))


def jobs(count: int) -> list[CompileJob]:
    return [job(block_n) for block_n in range(1, count + 1)]


def compiled(
    asked: Sequence[CompileJob], cache: CompileCache | None = None, source: KernelSource = SOURCE, **options: object
) -> Compiled:
    return compile_all(source, asked, cache=cache or CompileCache(None), workers=2, **options)  # type: ignore[arg-type]


def fine(asked: Sequence[CompileJob]) -> Compiled:
    return {each: Resources(each.key.block_n, 64, 0) for each in asked}


def test_each_job_gets_its_own_answer() -> None:
    assert compiled(jobs(12)) == fine(jobs(12))


def test_a_job_that_is_asked_for_twice_is_compiled_once(log: Path) -> None:
    compiled([job(1), job(1), job(1)])
    assert compilations(log) == 1


def test_no_jobs_need_no_compiler() -> None:
    assert compiled([]) == {}


@pytest.mark.parametrize("does", MISHAPS.values(), ids=MISHAPS.keys())
@pytest.mark.parametrize("at", [0, 3, 6], ids=["first", "amid", "last"])
def test_a_mishap_costs_its_own_job_alone(does: int, at: int) -> None:
    healthy = jobs(6)
    found = compiled([*healthy[:at], job(99, does), *healthy[at:]])
    assert {each: found[each] for each in healthy} == fine(healthy)


@pytest.mark.parametrize(
    ("does", "kind"),
    [(EXITS, "Crash"), (SEGFAULTS, "Crash"), (RAISES, "RuntimeError"), (OUT_OF_MEMORY, "MemoryError"),
     (REFUSED, "CompilationError")],
    ids=["crash", "segfault", "error", "out of memory", "refused"],
)  # fmt: skip
def test_a_mishap_is_reported_as_what_it_was(does: int, kind: str) -> None:
    found = compiled([job(1, does)])[job(1, does)]
    assert isinstance(found, Failure) and found.kind == kind


def test_several_crashes_each_cost_one_job() -> None:
    bad, good = [job(101, EXITS), job(102, SEGFAULTS), job(103, EXITS)], jobs(4)
    found = compiled([bad[0], bad[1], *good, bad[2]])
    assert {each for each, result in found.items() if isinstance(result, Failure)} == set(bad)


@pytest.mark.parametrize("does", [EXITS, OUT_OF_MEMORY], ids=["crash", "out of memory"])
def test_a_mishap_of_this_machine_is_tried_again_next_time(does: int, log: Path) -> None:
    cache = CompileCache(None)
    compiled([job(1, does)], cache)
    before = compilations(log)
    compiled([job(1, does)], cache)
    assert compilations(log) > before


def test_a_refusal_of_the_compiler_is_not_tried_again(log: Path) -> None:
    cache = CompileCache(None)
    compiled([job(1, REFUSED)], cache)
    compiled([job(1, REFUSED)], cache)
    assert compilations(log) == 1


def test_a_later_run_takes_what_an_earlier_one_left_on_disk(tmp_path: Path, log: Path) -> None:
    asked = [*jobs(4), job(9, REFUSED)]
    first = compiled(asked, CompileCache(tmp_path / "compiled.sqlite"))
    log.write_bytes(b"")
    assert (compiled(asked, CompileCache(tmp_path / "compiled.sqlite")), compilations(log)) == (first, 0)


def test_another_kernel_takes_nothing_from_the_cache(log: Path) -> None:
    cache = CompileCache(None)
    compiled([job(1)], cache)
    compiled([job(1)], cache, KernelSource("fake", "tests.tuning.fake_kernel", "2", False))
    assert compilations(log) == 2


def test_binaries_that_will_be_launched_are_made_even_where_their_needs_are_known(tmp_path: Path, log: Path) -> None:
    cache = CompileCache(None)
    compiled(jobs(2), cache)
    compiled(jobs(2), cache, triton_cache=tmp_path / "triton")
    assert compilations(log) == 4


def test_a_known_refusal_is_not_tried_again_for_the_sake_of_its_binary(tmp_path: Path, log: Path) -> None:
    cache = CompileCache(None)
    compiled([job(1, REFUSED)], cache)
    compiled([job(1, REFUSED)], cache, triton_cache=tmp_path / "triton")
    assert compilations(log) == 1


@pytest.mark.parametrize(
    "content",
    [b"not a database", b"SQLite format 3\0" + b"\xff" * 4096, b""],
    ids=["text", "broken pages", "empty"],
)
def test_a_broken_cache_file_costs_no_more_than_compiling_again(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "compiled.sqlite"
    path.write_bytes(content)
    assert compiled(jobs(2), CompileCache(path)) == fine(jobs(2))


@pytest.mark.parametrize(
    "row",
    ["", "null", "[]", "7", '{"kind": "x"}', '{"smem_bytes": 1}'],
    ids=["empty", "null", "list", "number", "half a failure", "half of resources"],
)
def test_a_row_of_the_cache_that_makes_no_sense_is_passed_over(tmp_path: Path, row: str) -> None:
    path = tmp_path / "compiled.sqlite"
    cache = CompileCache(path)
    cache.put(SOURCE, job(1), Resources(1, 1, 0))
    with sqlite3.connect(path) as database:
        database.execute("UPDATE compiled SET result = ?", (row,))
    assert cache.get(SOURCE, job(1)) is None


def test_a_cache_that_cannot_be_made_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = CompileCache(tmp_path / "file" / "compiled.sqlite")
    cache.put(SOURCE, job(1), Resources(1, 2, 3))
    assert cache.get(SOURCE, job(1)) == Resources(1, 2, 3)


@pytest.mark.parametrize("known", [0, 2, 5], ids=["nothing known", "some known", "all known"])
@pytest.mark.parametrize("launched", [False, True], ids=["for their needs", "for a launch"])
def test_progress_counts_up_by_one_to_all(tmp_path: Path, known: int, launched: bool) -> None:
    cache = CompileCache(None)
    compiled(jobs(known), cache)
    seen: list[tuple[int, int]] = []
    compiled(
        jobs(5), cache, triton_cache=tmp_path / "triton" if launched else None, progress=lambda *at: seen.append(at)
    )
    start = 0 if launched else known
    assert seen == [(done, 5) for done in range(start, 6)]


def test_progress_reaches_the_end_after_a_crash() -> None:
    seen: list[tuple[int, int]] = []
    compiled([job(99, EXITS), *jobs(3)], progress=lambda *at: seen.append(at))
    assert seen[-1] == (4, 4)
