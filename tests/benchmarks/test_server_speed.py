"""The benchmark of whole HTTP servers, with a server of our own that answers as SGLang does and loads no model."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import server_speed
from benchmarks.server_speed import Clock
from benchmarks.serving import dummy_weights, http_report, http_server, plugin_site
from benchmarks.serving.http_report import Measured
from benchmarks.serving.http_server import Launch
from benchmarks.vs_upstream.report import Place
from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError
from sglang_moe_ext.e2e.client import Batch, Client, prompt
from sglang_moe_ext.engines.server_log import Said, read_log
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.gpu.names import find_gpu
from tests.engines.installed import ENGINES_DIR

FAKE = (Path(__file__).parents[1] / "e2e" / "fake_server.py").read_text()
PLACE = Place(
    find_gpu("H200"), SglangInstallation("0.5.15", Path("sglang"), "3.6.0"), "2026-11-26", "python -m benchmarks.it"
)
ACTIVE, ABSENT = Said(True, ("ours",), ()), Said(False, (), ())
CLOCK_S = 60.0


def launch(folder: Path, way: str = "serves", **limits: float) -> Launch:
    (folder / "fake.py").write_text(FAKE)
    command = (sys.executable, str(folder / "fake.py"), way)
    return Launch(command, folder / "site", folder, **{"life_s": 30.0, "start_s": 20.0, **limits})


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def measured(folder: Path, way: str = "serves", kind: http_report.Kind = "plugin") -> Measured:
    """By the whole chain, with short prompts and two requests."""
    asked = server_speed.parser().parse_args(["--prompts", "100", "200", "--requests", "2", "--batch-runs", "2"])
    into = Measured(kind)
    server_speed.serve(kind, launch(folder, way), folder / "log", into, asked, Clock(CLOCK_S), lambda: None)
    return into


def test_the_time_to_the_first_token_ends_with_the_first_event_of_the_stream(tmp_path: Path) -> None:
    with http_server.running(launch(tmp_path), tmp_path / "log", stock=True) as server:
        ms = server.client.first_token_ms(2000, seed=0)
    assert 200 <= ms < 450, "200 ms until the first event, 533 until the end of the stream"


def test_requests_of_a_batch_are_sent_at_once_and_all_their_tokens_count(tmp_path: Path) -> None:
    with http_server.running(launch(tmp_path), tmp_path / "log", stock=True) as server:
        batch = server.client.batch(8, 100, 16, seed=0)
        assert "together 8" in server.log.read_text()
    assert batch.tokens == 8 * 16
    assert 0.2 <= batch.seconds < 1.4, "one after the other they take 1.6 s"


def test_tokens_a_second_are_those_of_all_requests() -> None:
    assert Batch(32, 32 * 128, 2.0).tokens_per_s == 2048


def test_prompts_of_two_seeds_differ_from_the_first_token_on() -> None:
    assert prompt(1000, 1) == prompt(1000, 1)
    assert len(prompt(1000, 1)) == 1000
    assert prompt(1000, 1)[0] != prompt(1000, 2)[0]


def test_no_prompt_is_the_beginning_of_a_longer_one() -> None:
    assert prompt(1024, 1)[:512] != prompt(512, 1)
    assert prompt(1024, 1)[0] != prompt(512, 1)[0]


@pytest.mark.parametrize(
    ("way", "complaint"),
    [
        ("fails", "answered 500: b'no memory'"),
        ("refuses", "too long"),
        ("short", "expected generated|expected 128 each"),
    ],
)
def test_an_answer_that_is_none_ends_the_server_and_is_told(tmp_path: Path, way: str, complaint: str) -> None:
    into = measured(tmp_path, way)
    assert into.failure is not None
    assert any(part in into.failure for part in complaint.split("|"))


def test_a_server_that_ends_early_is_told_with_its_last_words(tmp_path: Path) -> None:
    assert measured(tmp_path, "dies").failure == "the server ended with status 1: no GPU"


def test_a_server_that_hangs_is_ended(tmp_path: Path) -> None:
    begun = time.monotonic()
    with (
        pytest.raises(EngineError, match="not healthy after 1 s: it said nothing"),
        http_server.running(launch(tmp_path, "hangs", start_s=1.0), tmp_path / "log", stock=True),
    ):
        pass
    assert time.monotonic() - begun < 15


def test_a_server_that_outlives_its_limit_is_killed(tmp_path: Path) -> None:
    with http_server.running(launch(tmp_path, life_s=2.0), tmp_path / "log", stock=True) as server:
        time.sleep(2.5)
        assert not server.client.is_healthy()


def test_no_child_of_a_server_is_left(tmp_path: Path) -> None:
    with http_server.running(launch(tmp_path), tmp_path / "log", stock=True) as server:
        (child,) = [int(line.split()[1]) for line in server.log.read_text().splitlines() if line.startswith("child")]
        assert is_alive(child)
    assert not is_alive(child)


def test_a_server_is_measured_in_all_cases_and_its_log_is_read(tmp_path: Path) -> None:
    into = measured(tmp_path)
    assert into.failure is None
    assert {size: len(taken) for size, taken in into.ttft_ms.items()} == {100: 7, 200: 7}
    assert set(into.first_ms) == {100, 200}
    assert {requests: len(rates) for requests, rates in into.tokens_per_s.items()} == {2: 2}
    assert into.said == Said(True, ("sglang-moe-ext 1.0 is active in SGLang 0.5.15, by the entry point",), ())


def test_stock_is_started_with_the_plugin_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(env.DISABLE, raising=False)
    into = measured(tmp_path, kind="stock")
    assert into.said == Said(False, (), ())
    assert http_report.wrongly_attached(into) is None


def test_cases_for_which_no_time_is_left_are_told_and_the_others_kept(tmp_path: Path) -> None:
    into, late = Measured("stock"), Clock(0.0)
    asked = server_speed.parser().parse_args([])
    server_speed.serve("stock", launch(tmp_path), tmp_path / "log", into, asked, late, lambda: None)
    assert into.failure == "no time was left for prompts of 1024 tokens"
    assert into.start_s is not None


@pytest.mark.parametrize(
    ("kind", "said", "wrong"),
    [
        ("stock", ACTIVE, "by the log of the stock server the plugin is active"),
        ("plugin", ABSENT, "by the log of the plugin server the plugin is not active"),
        ("stock", ABSENT, None),
        ("plugin", ACTIVE, None),
        ("plugin", None, None),
    ],
)
def test_a_server_that_is_not_what_its_name_says_is_told(
    kind: http_report.Kind, said: Said | None, wrong: str | None
) -> None:
    assert http_report.wrongly_attached(Measured(kind, said=said)) == wrong


def test_a_log_gives_lines_on_tables_once_and_errors() -> None:
    told = "Using default MoE kernel config. Performance might be sub-optimal!"
    lines = [
        f"[2026-11-26 02:00:00] {told}",
        f"Capturing batches:   0%|          | 0/12 [00:00<?, ?it/s][2026-11-26 02:00:09] {told}",
        "[2026-11-26 02:00:10] Uvicorn running",
        "[2026-11-26 02:00:11] RuntimeError: CUDA error: an illegal memory access",
    ]
    error = "RuntimeError: CUDA error: an illegal memory access"
    assert read_log("\n".join(lines)) == Said(False, (told,), (error,))


def three() -> list[Measured]:
    stock = Measured("stock", 60.0, {1024: 900.0}, {1024: [30.0, 31.0, 32.0]}, {32: [1000.0, 1100.0]}, ABSENT)
    plugin = Measured("plugin", 70.0, {1024: 40.0}, {1024: [20.0, 20.0, 26.0]}, {32: [2100.0]}, ACTIVE)
    return [stock, plugin, Measured("stock", failure="no time was left for this server")]


def test_the_table_has_a_column_for_each_server_and_the_gain() -> None:
    rows = http_report.table(three(), [1024, 2048], [(32, 1024, 128)]).splitlines()
    assert rows[0] == "| | stock | plugin | stock 2 | gain |"
    assert rows[2] == (
        "| time to the first token of 1,024, ms | 31.0 (30.0 to 32.0) | 20.0 (20.0 to 26.0) | - | 1.550x |"
    )
    assert rows[3] == "| time to the first token of 2,048, ms | - | - | - | - |"
    assert (
        rows[4]
        == "| 32 requests of 1,024 in, 128 out, tokens/s | 1050 (1000 to 1100) | 2100 (2100 to 2100) | - | 2.000x |"
    )
    assert "| the first prompt of 1,024, ms | 900 | 40 | - | |" in rows
    assert len({row.count("|") for row in rows}) == 1


def test_the_second_stock_server_counts_for_the_gain() -> None:
    servers = three()
    servers[2] = Measured("stock", ttft_ms={1024: [50.0, 50.0, 50.0]})
    row = http_report.table(servers, [1024], []).splitlines()[2]
    assert row.endswith("| 2.050x |"), "the median of 30, 31, 32, 50, 50 and 50 by 20"


def test_remarks_name_what_failed_and_what_a_log_said() -> None:
    assert http_report.remarks(three()).splitlines() == [
        "stock: plugin not active.",
        "",
        "plugin: plugin active.",
        "- ours",
        "",
        "stock 2: plugin unknown.",
        "- failed: no time was left for this server",
    ]


def test_the_document_has_every_run_and_is_json() -> None:
    document = http_report.document(PLACE, 48, "of some kind", None, three())
    again = json.loads(json.dumps(document))
    assert again["servers"][1]["ttft_ms"] == {"1024": [20.0, 20.0, 26.0]}
    assert [server["plugin_active"] for server in again["servers"]] == [False, True, None]
    assert (again["gpu"], again["engine"], again["triton"]) == ("NVIDIA H200", "sglang 0.5.15", "3.6.0")
    assert not server_speed.is_whole(again)
    assert server_speed.is_whole({"servers": again["servers"][:2]})


@pytest.mark.parametrize("words", [["--runs", "6"], ["--layers", "0"], ["--order", "tuned"], ["--requests", "0"]])
def test_arguments_that_mean_nothing_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        server_speed.parser().parse_args(words)
    assert words[0] in capsys.readouterr().err


def test_flags_after_two_dashes_are_the_servers() -> None:
    asked = server_speed.parser().parse_args(["--order", "stock", "--", "--chunked-prefill-size", "16384"])
    assert asked.order == ["stock"]
    command = http_server.command_of(Path("model"), asked.server_flags)
    assert command[-2:] == ("--chunked-prefill-size", "16384")


def test_the_whole_command_prints_the_table_last_and_writes_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    command = (sys.executable, str(tmp_path / "fake.py"), "serves")
    monkeypatch.setattr(http_server, "command_of", lambda *_: command)
    monkeypatch.setattr(server_speed, "here", lambda _: PLACE)
    monkeypatch.setattr(server_speed, "has_plans", lambda *_, **__: True)
    monkeypatch.setenv(env.STORE, str(tmp_path / "store"))
    monkeypatch.delenv(env.DISABLE, raising=False)
    cases = ["--prompts", "100", "--requests", "2", "--batch-runs", "1", "--order", "stock", "plugin"]
    assert server_speed.main([*cases, "--seconds", "200", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1].startswith("| start, s |")
    document = json.loads((tmp_path / "out" / "server_speed.json").read_text())
    assert [server["server"] for server in document["servers"]] == ["stock", "plugin"]
    assert server_speed.is_whole(document)


def test_json_is_all_of_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server_speed, "here", lambda _: PLACE)
    monkeypatch.setattr(server_speed, "has_plans", lambda *_, **__: True)
    monkeypatch.setenv(env.STORE, str(tmp_path / "store"))
    assert server_speed.main(["--json", "--seconds", "0"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert {server["failure"] for server in document["servers"]} == {"no time was left for this server"}


def test_a_gpu_with_shipped_plans_is_not_tuned_and_another_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.STORE, str(tmp_path / "store"))
    engine = SglangInstallation("0.5.15", ENGINES_DIR / "sglang" / "0.5.15" / "sglang", "3.6.0")
    places = [Place(find_gpu(gpu), engine, PLACE.date, PLACE.command) for gpu in ("H200", "B200")]
    assert [server_speed.has_plans(place) for place in places] == [True, False]


def test_a_tune_run_that_fails_is_told_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_speed, "has_plans", lambda *_, **__: False)
    monkeypatch.setattr(sys, "executable", "false")
    said = server_speed.tune_where_needed(PLACE, tmp_path, tmp_path, Clock(CLOCK_S))
    assert said == f"tune ended with status 1; its output is in {tmp_path / 'tune.log'}"


def test_the_site_has_the_entry_points_of_an_installation(tmp_path: Path) -> None:
    plugin_site.write(tmp_path, spread_weights=True)
    found = {
        (point.group, point.name, point.value)
        for distribution in importlib.metadata.distributions(path=[str(tmp_path)])
        for point in distribution.entry_points
    }
    assert found == {
        (plugin_site.GROUP, "sglang_moe_ext", plugin_site.OURS),
        (plugin_site.GROUP, "spread_dummy_weights", plugin_site.WEIGHTS),
    }
    text = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    assert f'[project.entry-points."{plugin_site.GROUP}"]\nsglang_moe_ext = "{plugin_site.OURS}"' in text


def test_without_weights_of_ours_the_engine_makes_its_own(tmp_path: Path) -> None:
    plugin_site.write(tmp_path, spread_weights=False)
    assert [it.name for it in importlib.metadata.distributions(path=[str(tmp_path)])] == ["sglang_moe_ext"]


@pytest.mark.parametrize("is_loaded", [True, False], ids=["loaded already", "loaded later"])
def test_the_weights_are_put_in_place_whenever_the_loader_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_loaded: bool
) -> None:
    name = f"loader_of_the_test_{is_loaded}".lower()
    (tmp_path / f"{name}.py").write_text("def initialize_dummy_weights(model): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(dummy_weights, "LOADER", name)
    loader: ModuleType | None = importlib.import_module(name) if is_loaded else None
    plugin_site.register_weights()
    loader = loader or importlib.import_module(name)
    assert loader.initialize_dummy_weights is dummy_weights.spread


def test_a_server_finds_the_plugin_before_any_other_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/engine")
    variables = launch(tmp_path).environment(stock=False)
    assert variables["PYTHONPATH"].split(os.pathsep) == [str(tmp_path / "site"), str(http_server.CHECKOUT), "/engine"]


def test_a_client_of_no_server_is_told_in_one_line() -> None:
    with pytest.raises(EngineError, match="did not answer a prompt of 10 tokens"):
        Client("http://127.0.0.1:1").first_token_ms(10, 0)
