"""docs/sglang-releases.md says what the sources of each release say, and our own code says the same."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from sglang_moe_ext.engines.sglang import installation, support
from tests.engines.sglang.test_source_patch import VERSIONS, patch_of, unpacked
from tools import engine_facts, serving_facts
from tools.engine_facts import Facts, UnreadableError

SCHEDULER = "srt/managers/scheduler.py: run_scheduler_process"
every_release = pytest.mark.parametrize("version", VERSIONS)


@functools.cache
def facts(version: str) -> Facts:
    return engine_facts.read(unpacked(version))


def test_the_document_is_what_the_sources_say() -> None:
    written = serving_facts.DOCUMENT.read_text(encoding="utf-8")
    assert written == serving_facts.document([facts(version) for version in VERSIONS])


@every_release
def test_the_entry_point_is_called_in_the_process_of_the_scheduler_wherever_there_are_entry_points(
    version: str,
) -> None:
    assert (SCHEDULER in facts(version).calls) == facts(version).has_plugins


@every_release
def test_no_release_calls_it_in_a_process_beside_servers(version: str) -> None:
    here = [file for file in engine_facts.BESIDE_SERVERS if (unpacked(version).root / file).is_file()]
    assert here and facts(version).uncalled == tuple(here)


@every_release
def test_up_tables_keep_tma_only_where_the_layer_knows_it(version: str) -> None:
    assert facts(version).knows_up_tma == (installation.parse_version(version) >= support.FIRST_WITH_UP_TMA)


@every_release
def test_the_patch_is_for_the_module_that_is_executed(version: str) -> None:
    target = "sglang." + patch_of(version).target.removesuffix(".py").replace("/", ".")
    assert target == f"{facts(version).layer_package}.fused_moe"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from sglang.srt.plugins import load_plugins\nclass A:\n def b(self):\n  if 1:\n   load_plugins()", ["A.b"]),
        ("def c():\n from sglang.srt.plugins import load_plugins\n load_plugins()", ["c"]),
        ("from sglang.srt.plugins import load_plugins\nif __name__: load_plugins()", ["the module"]),
        ("from sglang.srt.plugins import load_plugins\ndef c(): return load_plugins", []),
        ("from sglang.multimodal_gen import load_plugins\nload_plugins()", []),
    ],
    ids=["method", "imported within", "module", "not called", "another one"],
)
def test_a_call_is_told_from_what_is_none(source: str, found: list[str]) -> None:
    assert list(engine_facts.calls_in(ast.parse(source))) == found


@pytest.mark.parametrize(
    "fact",
    [
        engine_facts.knows_up_tma,
        engine_facts.asserts_one_block_m,
        engine_facts.reuses_up_table,
        engine_facts.tritons_are_listed,
        engine_facts.lookup_takes_per_channel,
        lambda module: engine_facts.returns_routed_experts([module]),
    ],
    ids=["up TMA", "BLOCK_SIZE_M", "reuse", "Tritons", "per channel", "routed experts"],
)
def test_sources_that_say_nothing_are_no_answer(fact: object) -> None:
    assert callable(fact)
    with pytest.raises(UnreadableError):
        fact(ast.parse("pass"))


@pytest.mark.parametrize("argv", [["--check"], []], ids=["checked", "written"])
def test_a_page_that_differs_fails_the_check_and_is_written_anew(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["serving_facts", *argv])
    monkeypatch.setattr(serving_facts, "all_facts", lambda: [facts("0.5.15")])
    monkeypatch.setattr(serving_facts, "ROOT", tmp_path)
    monkeypatch.setattr(serving_facts, "DOCUMENT", tmp_path / "facts.md")
    (tmp_path / "facts.md").write_text("old")
    if argv:
        with pytest.raises(SystemExit, match="out of date"):
            serving_facts.main()
    else:
        serving_facts.main()
        assert serving_facts.DOCUMENT.read_text() == serving_facts.document([facts("0.5.15")])
