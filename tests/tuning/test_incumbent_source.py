"""After tuning, and in a dry run, one sees what ran before, whose it was, and what is gained."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_moe_ext.cli import main, output
from sglang_moe_ext.core import MoEShape, Resources, TileConfig
from sglang_moe_ext.engines import lookup_cache
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.engines.sglang import adapter
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.tables import config_table, provenance
from sglang_moe_ext.tables.provenance import Provenance, ProvenanceEntry, TuningRun
from sglang_moe_ext.tuning import incumbent_source
from sglang_moe_ext.tuning.compile.kernel_source import KernelSource
from sglang_moe_ext.tuning.pipeline import TuneOutcome
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.request import TuneRequest
from sglang_moe_ext.tuning.search.predict import PredictedConfig

OLD, NEW = TileConfig(64, 64, 32, 8, 4, 3), TileConfig(128, 128, 64, 16, 8, 4)
NAME = "E=128,N=768,device_name=NVIDIA_H200.json"
TOKENS = (1, 64, 4096)
REQUEST = TuneRequest(
    model="Qwen3-30B-A3B",
    architecture="Qwen3MoeForCausalLM",
    problem=Problem(MoEShape(128, 768, 2048, 8), find_gpu("H200"), "sglang"),
    vllm_shape=None,
    gpu_is_here=False,
    tokens=TOKENS,
    measuring=None,
    install="none",
    output_dir=None,
    seed=0,
    command="tune",
)
RUN = TuningRun("", "", "Qwen3-30B-A3B", "", "NVIDIA H200", "k", None, "3.7.1", None, None, 0, "0")


def answer(*files: Path) -> LookupResult:
    taken = dict.fromkeys(TOKENS, OLD)
    return LookupResult("0.5.23", "3.7.1", "NVIDIA H200", taken, dict.fromkeys(taken), files, ())


def written(folder: Path, *origins: str) -> Path:
    """A table of SGLang for Triton 3.6.0, whose first entries are of these origins."""
    path = folder / "triton_3_6_0" / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config_table.to_json(dict.fromkeys(TOKENS, OLD)))
    entries = {m: ProvenanceEntry(origin, RUN) for m, origin in zip(TOKENS, origins, strict=False)}  # type: ignore[arg-type]
    if entries:
        provenance.sidecar(path).write_text(provenance.to_json(Provenance(entries)))
    return path


def said(*files: Path) -> list[str]:
    return incumbent_source.describe(incumbent_source.sources(REQUEST, answer(*files)))


def test_the_engines_default_is_called_one() -> None:
    assert said() == ["today: SGLang's default at M=1-4096"]


def test_a_shipped_table_is_named_with_its_triton(tmp_path: Path) -> None:
    assert said(written(tmp_path)) == [
        "today: a table for Triton 3.6.0 that SGLang ships, or that was put there by hand at M=1-4096"
    ]


def test_a_table_of_this_package_is_said_to_be_ours_already(tmp_path: Path) -> None:
    assert said(written(tmp_path, "predicted", "predicted", "predicted")) == [
        "today: your predicted table for Triton 3.6.0 at M=1-4096",
        "today is already a table of this package: a gain of 1.00x means that it stays",
    ]


def test_a_mixed_table_is_told_apart_by_number_of_tokens(tmp_path: Path) -> None:
    first, second = said(written(tmp_path, "measured"))
    assert first == "today: your measured table for Triton 3.6.0 at M=1"
    assert second.endswith("at M=64-4096")


def test_what_the_plugin_in_a_server_chose_is_repeated() -> None:
    by_plugin = LookupResult(
        "0.5.23",
        "3.7.1",
        "NVIDIA H200",
        dict.fromkeys(TOKENS, OLD),
        dict.fromkeys(TOKENS),
        (),
        (),
        whys=dict.fromkeys(TOKENS, "your table, entry 64; measured"),
    )
    assert incumbent_source.describe(incumbent_source.sources(REQUEST, by_plugin))[0] == "today: your table at M=1-4096"


def outcome(before: LookupResult | None) -> TuneOutcome:
    needs = Resources(1000, 100, 0)
    found = {m: PredictedConfig(NEW, 100.0, {"up": needs, "down": needs}) for m in TOKENS}
    kernel = KernelSource("k", "m", "f", is_engines_own=True)
    return TuneOutcome(
        results=found, plans={}, written=(), refused={}, destination=None, answer=None, kernel=kernel, today=before
    )


def test_a_predicted_table_stands_beside_what_ran_before() -> None:
    rows = output.results(REQUEST, outcome(answer())).rows
    for row, m in zip(rows, TOKENS, strict=True):
        cells = list(row)
        assert cells[:2] == [str(m), str(OLD)] and cells[3:5] == [str(NEW), "100.0"]
        assert cells[5] == f"{float(cells[2]) / 100:.2f}x"


def test_a_predicted_gain_is_called_predicted() -> None:
    found = outcome(answer())
    line = output.gain_line(output.gains(REQUEST, found), output.origin(found))
    assert line is not None and line.startswith("predicted gain over today: ")


def test_without_an_engine_there_is_no_today() -> None:
    assert [list(row)[1:3] for row in output.results(REQUEST, outcome(None)).rows] == [["-", "-"]] * 3


def test_programs_read_the_gain_and_whose_today_is(tmp_path: Path) -> None:
    document = output.document(REQUEST, outcome(answer(written(tmp_path, "predicted", "predicted", "predicted"))))
    assert [it["m"] for it in document["predictions"]] == list(TOKENS)
    assert all(it["gain"] == pytest.approx(it["today_us"] / 100, abs=1e-3) for it in document["predictions"])
    assert {it["ours"] for it in document["today"]} == {True}


class Probe:
    """An engine that answers, and counts how often it was started."""

    started = 0

    def __init__(self, environment: object) -> None:
        Probe.started += 1

    def answer(self, question: LookupRequest) -> LookupResult:
        taken = dict.fromkeys(question.tokens, OLD)
        return LookupResult("0.5.23", "3.7.1", "NVIDIA H200", taken, dict.fromkeys(taken), (), ("a line",))

    def close(self) -> None:
        pass


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An SGLang of which only the module of the lookup is there; gives the folder of its tables."""
    lookup = tmp_path / "sglang/srt/layers/moe/moe_runner/triton_utils/fused_moe_triton_config.py"
    folder = lookup.parent / "configs" / "triton_3_7_1"
    folder.mkdir(parents=True)
    lookup.touch()
    monkeypatch.setattr(adapter, "find", lambda: SglangInstallation("0.5.23", tmp_path / "sglang", "3.7.1"))
    monkeypatch.setattr(adapter, "start_probe", Probe)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(specs, "detect", lambda: None)
    Probe.started = 0
    return folder


DRY_RUN = ("tune", "--engine", "sglang", "--model", "Qwen3-30B-A3B", "--gpu", "H200", "--batch-size", "64", "--dry-run")


def test_a_dry_run_says_whom_it_asks_and_what(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(DRY_RUN) == 0
    assert "asking SGLang 0.5.23 what it runs today 0/1" in capsys.readouterr().err


def test_a_second_dry_run_starts_no_engine(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [main.main(DRY_RUN), main.main(DRY_RUN)] == [0, 0]
    assert Probe.started == 1
    first, _, second = capsys.readouterr().out.partition("will predict")
    assert "today: SGLang's default at M=64" in first and "today: SGLang's default at M=64" in second


def test_a_table_that_was_written_meanwhile_is_asked_for(engine: Path) -> None:
    main.main(DRY_RUN)
    (engine / NAME).write_text(config_table.to_json({64: OLD}))
    main.main(DRY_RUN)
    assert Probe.started == 2


def test_a_table_of_the_store_that_was_written_meanwhile_is_asked_for(engine: Path, tmp_path: Path) -> None:
    main.main(DRY_RUN)
    place = tmp_path / "store/tables/sglang/triton_3_7_1" / NAME
    place.parent.mkdir(parents=True)
    place.write_text(config_table.to_json({64: OLD}))
    main.main(DRY_RUN)
    assert Probe.started == 2


@pytest.mark.parametrize("variable", ["SGLANG_MOE_CONFIG_DIR", "VLLM_TUNED_CONFIG_FOLDER", "CUDA_VISIBLE_DEVICES"])
def test_a_variable_that_decides_on_tables_is_part_of_the_question(
    variable: str, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main.main(DRY_RUN)
    monkeypatch.setenv(variable, "0")
    main.main(DRY_RUN)
    assert Probe.started == 2


def test_an_answer_comes_back_as_it_was(engine: Path) -> None:
    given = LookupResult(
        "0.5.23",
        "3.7.1",
        "H200",
        {1: OLD},
        {1: None},
        (engine / NAME,),
        ("x",),
        "active",
        {1: "why"},
        {1: "p"},
        {1: {"up": {"BLOCK_SIZE_M": 16}}},
        {1: {"up": "too large"}},
        {1: {"BLOCK_SIZE_M": 32}},
        {2: "ValueError"},
        ("odd",),
    )
    lookup_cache.remember("key", given)
    assert lookup_cache.recall("key") == given


@pytest.mark.parametrize("text", ["", "{", "[]", '{"up": 3}', "null"])
def test_a_damaged_memory_is_no_answer(text: str, engine: Path) -> None:
    lookup_cache.folder().mkdir(parents=True)
    (lookup_cache.folder() / "key.json").write_text(text)
    assert lookup_cache.recall("key") is None
