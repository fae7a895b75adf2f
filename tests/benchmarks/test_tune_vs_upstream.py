"""The comparison with upstream's tuning command, on folders and commands that are stand-ins of our own.

Upstream's scripts lie in SGLang's source tree alone and are not ours to commit: the stand-ins keep their command line,
what they print, and where they write.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import racing, tune_vs_upstream
from benchmarks.racing import Outcome, Runner
from benchmarks.vs_upstream import effort, model_folder, ours, report, theirs, timed_run
from benchmarks.vs_upstream.report import Place
from benchmarks.vs_upstream.timed_run import Line, Run
from sglang_moe_ext.core import CompileJob, EngineError, Failure, ModelError, MoEShape, Quantization, TileConfig
from sglang_moe_ext.engines.lookup_probe import LookupResult, ProbeModule
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.tables import config_table
from sglang_moe_ext.tuning.bench import routing
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    LayerTimes,
    Pair,
)
from tests.engines.installed import REPO_ROOT

TODAYS, THEIRS, OURS = (TileConfig(16, block_n, 64, 1, 4, 2) for block_n in (32, 64, 128))
DOWN = TileConfig(16, 64, 128, 1, 4, 3)
WHOLE = 12
"""Configurations of the stand-in's space that fit blocks of 128; two more do not."""

LIBRARY = """
def get_configs_compute_bound():
    return [{"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": k, "GROUP_SIZE_M": group, "num_warps": 4,
             "num_stages": 2} for k in (64, 128) for group in range(1, 7)] + [
            {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 256, "GROUP_SIZE_M": group, "num_warps": 4,
             "num_stages": 2} for group in (1, 2)]
def get_model_config(model, tp_size, ep_size=1, disable_shared_experts_fusion=False):
    import json
    with open(model + "/config.json") as file:
        config = json.load(file)
    experts = config["num_experts" if "num_experts" in config else "num_local_experts"]
    return {"num_experts": experts // ep_size, "topk": config["num_experts_per_tok"],
            "hidden_size": config["hidden_size"], "dtype": "theirs", "architecture": "theirs",
            "shard_intermediate_size": 2 * config["moe_intermediate_size"] // tp_size,
            "block_shape": config.get("quantization_config", {}).get("weight_block_size")}
"""
SCRIPT = """
import argparse, json, os, time
import ray
from common_utils import get_configs_compute_bound, get_model_config
from ray.experimental.tqdm_ray import tqdm

@ray.remote(num_gpus=1)
class Tuner:
    def __init__(self, seed):
        assert seed == 0 and ray.get_gpu_ids()[0] == 0
    def tune(self, space):
        for config in tqdm(space):
            time.sleep(float(os.environ.get("FAKE_SECONDS", "0.01")))
        return {**config, "BLOCK_SIZE_K": 64}

parser = argparse.ArgumentParser()
parser.add_argument("--model")
for name in ("--tp-size", "--ep-size", "--batch-size"):
    parser.add_argument(name, type=int)
parser.add_argument("--dtype", choices=["auto", "fp8_w8a8", "int8_w8a8"])
for name in ("--tune", "--per-channel-quant", "--disable-shared-experts-fusion"):
    parser.add_argument(name, action="store_true")
parser.add_argument("--search-space-file")
args = parser.parse_args()
if "FAKE_ERROR" in os.environ:
    raise RuntimeError(os.environ["FAKE_ERROR"])
assert args.tune
block = get_model_config(args.model, args.tp_size)["block_shape"]
space = json.load(open(args.search_space_file)) if args.search_space_file else get_configs_compute_bound()
space = [config for config in space if block is None or block[1] % config["BLOCK_SIZE_K"] == 0]
ray.init()
tuners = [Tuner.remote(0) for _ in range(int(ray.available_resources()["GPU"]))]
print(f"Start tuning over {len(space)} configurations to create E=1.json...")
start = time.perf_counter()
best = ray.get([tuners[0].tune.remote(space)])
with open("E=1.json", "w") as file:
    json.dump({str(args.batch_size): best[0]}, file)
print(f"Tuning took {time.perf_counter() - start:.2f} seconds")
"""
OUR_COMMAND = """
import json, os, pathlib, sys
if "FAKE_ERROR_OF_OURS" in os.environ:
    sys.exit(os.environ["FAKE_ERROR_OF_OURS"])
folder = pathlib.Path(sys.argv[sys.argv.index("--output-dir") + 1]) / "configs" / "triton_3_6_0"
folder.mkdir(parents=True)
for name, text in json.loads(os.environ["FAKE_TABLES"]).items():
    (folder / name).write_text(text)
"""


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    folder = tmp_path / "their folder"
    folder.mkdir()
    (folder / "common_utils.py").write_text(LIBRARY, encoding="utf-8")
    (folder / "tuning_fused_moe_triton.py").write_text(SCRIPT, encoding="utf-8")
    return folder


class FakeWorker:
    """A GPU that is a table: the wider its up tile, the faster the layer."""

    def __init__(self, fails: tuple[TileConfig, ...] = (), throttled: str | None = None) -> None:
        self.fails, self.throttled = fails, throttled
        self.asked: list[BenchRequest] = []
        self.is_closed = False

    def measure(self, request: BenchRequest) -> BenchResult:
        self.asked.append(request)
        match request:
            case BenchLayers() if any(config in self.fails for pair in request.pairs for config in pair.values()):
                return Failure("OutOfResources", "shared memory")
            case BenchLayers():
                us = [6400 / pair["up"].block_n for pair in request.pairs]
                drift = [1 + turn / request.rounds for turn in range(request.rounds)]
                return LayerTimes(tuple(tuple(mine * slow for slow in drift) for mine in us), 4, self.throttled)
            case CheckAccuracy():
                return Accuracy(0.002)
        raise AssertionError(request)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeWorker:
    """A place with an H200, an SGLang, our command and a worker, none of which is one."""
    gpu, fake = specs.find("H200"), FakeWorker()
    place = Place(gpu, SglangInstallation("0.5.15", tmp_path, "3.6.0"), "2026-11-21", "the command")
    taken = LookupResult("0.5.15", "3.6.0", gpu.device_name, {8: TODAYS}, {8: None}, (), ())
    command = tmp_path / "our_command.py"
    command.write_text(OUR_COMMAND, encoding="utf-8")
    monkeypatch.setattr(report, "here", lambda _: place)
    monkeypatch.setattr(ProbeModule, "ask", lambda *_: taken)
    monkeypatch.setattr(ours, "COMMAND", (sys.executable, str(command)))
    monkeypatch.setattr(racing, "compile_all", lambda *_, **__: {})
    monkeypatch.setattr(racing, "BenchProcess", lambda _: fake)
    name = "E=128,N=768,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128]"
    written = {f"{name}.json": config_table.to_json({8: OURS}), f"{name}_down.json": config_table.to_json({8: DOWN})}
    monkeypatch.setenv("FAKE_TABLES", json.dumps(written))
    return fake


@pytest.fixture
def compared(upstream: Path, worker: FakeWorker) -> Callable[..., int]:
    def main(*more: str, model: str = "Qwen3-30B-A3B-FP8") -> int:
        given = ("--upstream", str(upstream), "--model", model, "--batch-size", "8", "--ray-stand-in")
        return tune_vs_upstream.main((*given, *more))

    return main


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return found


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of standard error, which is the one of ours."""
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("error: ")
    return last


def test_both_commands_run_to_their_end_and_their_choices_are_raced(
    compared: Callable[..., int], worker: FakeWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared() == 0
    found = document(capsys)
    assert found["upstream"]["tried"] == found["upstream"]["whole"] == WHOLE
    assert found["upstream"]["is_extrapolated"] is False
    assert found["upstream"]["seconds"] == found["upstream"]["ran_s"]
    assert found["ratio"] == pytest.approx(found["upstream"]["seconds"] / found["seconds"], rel=0.05)
    assert {name: choice["gain"] for name, choice in found["choices"].items()} == {
        "the engine's today": 1.0,
        "upstream's": 2.0,
        "ours": 4.0,
    }
    assert worker.is_closed


def test_the_race_is_of_upstreams_one_configuration_and_of_our_pair(
    compared: Callable[..., int], worker: FakeWorker
) -> None:
    assert compared() == 0
    raced = next(request for request in worker.asked if isinstance(request, BenchLayers) and len(request.pairs) > 1)
    todays, of_theirs, of_ours, again = raced.pairs
    assert todays == again == {"up": TODAYS, "down": TODAYS}
    assert of_theirs["up"] == of_theirs["down"]
    assert of_theirs["up"].block_n == THEIRS.block_n
    assert of_ours == {"up": OURS, "down": DOWN}


def test_what_is_printed_says_where_when_and_how(
    compared: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared() == 0
    out = capsys.readouterr().out
    assert out.startswith("NVIDIA H200, SGLang 0.5.15, Triton 3.6.0, 2026-11-21: `the command`\n")
    assert "| ours | 16x128x64 G1 w4 s2 | 16x64x128 G1 w4 s3 | " in out
    assert "extrapolated" not in "\n".join(out.splitlines()[:-1])


def test_a_sample_is_extrapolated_and_says_so(
    compared: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    assert compared("--every", "3") == 0
    out = capsys.readouterr().out
    assert "Upstream's seconds are extrapolated" in out
    assert f"tried 4 of its {WHOLE} configurations" in out
    told = json.loads(out.splitlines()[-1])["upstream"]
    assert told["seconds"] - told["ran_s"] == pytest.approx(0.3 * (WHOLE - 4), rel=0.3)


def test_a_stopped_script_is_extrapolated_from_its_progress_and_has_no_choice(
    compared: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "0.5")
    assert compared("--seconds", "3") == 0
    out = capsys.readouterr().out
    assert "what it would have chosen is not known" in out
    found = json.loads(out.splitlines()[-1])
    assert list(found["choices"]) == ["the engine's today", "ours"]
    assert 1 <= found["upstream"]["tried"] < WHOLE
    assert found["upstream"]["seconds"] == pytest.approx(0.5 * WHOLE, rel=0.3)


def test_a_layer_that_upstream_sees_otherwise_is_told(
    compared: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, upstream: Path
) -> None:
    library = (upstream / "common_utils.py").read_text().replace("experts = ", "experts = 1 + ")
    (upstream / "common_utils.py").write_text(library)
    assert compared() == 0
    assert "Upstream's script tunes it as E=129,N=768,K=2048,topk=8,block_shape=[128, 128]." in capsys.readouterr().out


def test_a_folder_without_the_script_is_one_error(
    compared: Callable[..., int], upstream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (upstream / "tuning_fused_moe_triton.py").unlink()
    assert compared() == 1
    assert "no tuning_fused_moe_triton.py there; expected benchmark/kernels" in only_error(capsys)


def test_a_script_that_fails_is_one_error_with_its_last_words(
    compared: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ERROR", "no such layer")
    assert compared() == 1
    assert only_error(capsys).endswith("upstream's script failed with exit status 1: RuntimeError: no such layer")


def test_a_script_that_is_stopped_too_early_is_one_error(
    compared: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "60")
    assert compared("--seconds", "2") == 1
    assert "before its first configuration was done: give it more --seconds" in only_error(capsys)


def test_a_model_that_upstream_cannot_read_is_one_error(
    compared: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(model="GLM-4.7-Flash") == 1
    assert "upstream's common_utils.py failed on" in (said := only_error(capsys))
    assert said.endswith("KeyError: 'num_local_experts'")


def test_our_own_failure_is_one_error(
    compared: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ERROR_OF_OURS", "error: no GPU")
    assert compared() == 1
    assert only_error(capsys).endswith("our own command failed with exit status 1: error: no GPU")


def test_a_table_of_another_layer_is_not_taken_for_ours(
    compared: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TABLES", json.dumps({"E=1,N=2,device_name=X.json": config_table.to_json({8: OURS})}))
    assert compared() == 1
    assert "our own command wrote no E=128,N=768" in only_error(capsys)


def test_no_gpu_is_one_error(
    upstream: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specs, "detect", lambda: None)
    assert tune_vs_upstream.main(("--upstream", str(upstream), "--model", "GLM-4.7-Flash", "--batch-size", "8")) == 1
    assert "this machine has no GPU" in only_error(capsys)


def pair(up: TileConfig) -> Pair:
    return {"up": up, "down": up}


def test_a_choice_that_cannot_run_does_not_spoil_the_race_of_the_others() -> None:
    worker = FakeWorker(fails=(THEIRS,), throttled="power")
    choices = {"today": pair(TODAYS), "upstream's": pair(THEIRS), "ours": pair(OURS)}
    found = racing.compare(8, choices, worker.measure, 8)
    assert list(found.by_name) == list(choices)
    assert found.by_name["upstream's"] == Runner(pair(THEIRS), Failure("OutOfResources", "shared memory"))
    assert (gain := found.gain("today", "ours")) is not None
    assert gain.value == pytest.approx(4.0)
    text = report.choices(found)
    assert "fails: OutOfResources" in text
    assert "slowed down during the race: power" in text


def test_the_two_choices_are_set_against_each_other() -> None:
    choices = {"today": pair(TODAYS), "upstream's": pair(THEIRS), "ours": pair(OURS)}
    found = racing.compare(8, choices, FakeWorker().measure, 8)
    ratio = found.gain("upstream's", "ours")
    assert ratio is not None
    assert f"Time of upstream's choice by that of ours: {ratio.value:.3f}x" in report.choices(found)


def test_what_cannot_run_is_not_checked() -> None:
    worker = FakeWorker(fails=(THEIRS,))
    racing.compare(8, {"upstream's": pair(THEIRS), "ours": pair(OURS)}, worker.measure, 8)
    assert [request for request in worker.asked if isinstance(request, CheckAccuracy)] == [CheckAccuracy(8, pair(OURS))]


def test_a_wrong_choice_is_told_by_its_error() -> None:
    wrong = pair(THEIRS)

    def measure(request: BenchRequest) -> BenchResult:
        if isinstance(request, CheckAccuracy):
            return Accuracy(math.inf if request.pair == wrong else 0.002)
        return FakeWorker().measure(request)

    found = racing.compare(8, {"upstream's": wrong, "ours": pair(OURS)}, measure, 8)
    assert {name: runner.error for name, runner in found.by_name.items()} == {"upstream's": math.inf, "ours": 0.002}


def test_without_a_first_choice_that_runs_there_is_no_gain() -> None:
    found = racing.compare(8, {"today": pair(TODAYS), "ours": pair(OURS)}, FakeWorker(fails=(TODAYS,)).measure, 32)
    assert found.gain("today", "ours") is None
    assert found.us("ours") == pytest.approx(6400 / 128 * 1.5, rel=0.05)


def test_a_race_that_fails_though_each_alone_runs_is_told_of_each() -> None:
    def measure(request: BenchRequest) -> BenchResult:
        if isinstance(request, BenchLayers) and len(request.pairs) > 1:
            return Failure("Timeout", "no result")
        return FakeWorker().measure(request)

    found = racing.compare(8, {"today": pair(TODAYS), "ours": pair(OURS)}, measure, 8)
    told = {runner.us for runner in found.by_name.values()}
    assert told == {Failure("Timeout", "runs alone, but not beside the others: no result")}


def test_a_batch_size_that_one_search_left_out_is_raced_by_the_others(worker: FakeWorker) -> None:
    track = racing.Track(MoEShape(8, 64, 64, 2), specs.find("H200"), routing.UNIFORM)
    found = racing.raced(track, {"today": {8: pair(TODAYS), 1: pair(TODAYS)}, "ours": {8: pair(OURS)}})
    assert {m: list(outcome.by_name) for m, outcome in found.items()} == {1: ["today"], 8: ["today", "ours"]}
    assert (found[1].us("ours"), found[1].gain("today", "ours")) == (None, None)


def test_the_binaries_of_all_choices_are_made_before_the_race(
    worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[CompileJob] = []
    monkeypatch.setattr(racing, "compile_all", lambda _, jobs, **__: made.extend(jobs))
    track = racing.Track(MoEShape(8, 64, 64, 2), specs.find("H200"), routing.UNIFORM)
    racing.raced(track, {"today": {8: pair(TODAYS)}, "ours": {8: {"up": OURS, "down": DOWN}}})
    assert [job.key for job in made] == [config.compile_key for config in (TODAYS, TODAYS, OURS, DOWN)]
    assert {job.group_m for job in made} == {1}


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
def test_the_mean_gain_leaves_out_where_one_does_not_run(gains: list[float]) -> None:
    runs = {m: Outcome({"a": Runner({}, (gain,)), "b": Runner({}, (1.0,))}) for m, gain in enumerate(gains)}
    fails = Outcome({"a": Runner({}, Failure("Timeout", "")), "b": Runner({}, (1.0,))})
    expected = math.prod(gains) ** (1 / len(gains))
    assert racing.geomean({**runs, 99: fails}, "a", "b") == pytest.approx(expected)


def run_of(*, start_s: float, first_s: float, each_s: float, done: int, of_all: int, status: int | None) -> Run:
    at_s = start_s + first_s
    lines = [Line(start_s, f"Start tuning over {of_all} configurations to create E=1.json...")]
    for count in range(1, done + 1):
        lines.append(Line(at_s, f" 10%|#    | {count}/{of_all} [00:10<01:00,  1.9s/it]"))
        at_s += each_s if count < done else 0
    return Run(at_s if status is None else at_s + 2.0, status, tuple(lines))


@given(st.integers(2, 40), st.integers(1, 1900), st.floats(0.01, 10), st.floats(0, 100))
def test_the_first_configuration_and_the_ends_count_once(done: int, more: int, each_s: float, first_s: float) -> None:
    run = run_of(start_s=20, first_s=first_s, each_s=each_s, done=done, of_all=done, status=0)
    found = effort.of(run, done + more)
    assert found.seconds == pytest.approx(20 + first_s + each_s * (done + more - 1) + 2)
    assert found.is_extrapolated


def test_a_stopped_run_counts_from_what_was_done() -> None:
    run = run_of(start_s=10, first_s=5, each_s=2, done=11, of_all=100, status=None)
    assert effort.of(run, 100) == effort.Effort(10 + 5 + 2 * 99, 11, 100, 35)


def test_one_configuration_is_enough_to_extrapolate_from() -> None:
    run = run_of(start_s=10, first_s=5, each_s=2, done=1, of_all=100, status=None)
    assert effort.of(run, 100).seconds == 10 + 5 * 100


def test_a_run_whose_progress_was_not_heard_goes_by_its_own_seconds() -> None:
    lines = (Line(10, "Start tuning over 10 configurations to create x"), Line(31, "Tuning took 20.00 seconds"))
    assert effort.of(Run(31, 0, lines), 100).seconds == pytest.approx(10 + 200 + 1)


def test_another_progress_bar_is_not_the_tuning() -> None:
    run = run_of(start_s=10, first_s=5, each_s=2, done=11, of_all=100, status=None)
    other = Line(1, "Loading: 100%|#####| 7/7 [00:01<00:00]")
    later = Line(34, "Loading: 100%|#####| 7/7 [00:01<00:00]")
    assert effort.of(Run(run.seconds, None, (other, *run.lines, later)), 100) == effort.of(run, 100)


def test_a_script_that_does_not_announce_its_work_is_one_error() -> None:
    with pytest.raises(EngineError, match="did not say how many"):
        effort.of(Run(3, 0, (Line(1, "done"),)), 10)


@given(st.integers(1, 60), st.integers(1, 60))
def test_a_sample_is_of_the_space_and_of_its_size(size: int, every: int) -> None:
    space = [{"GROUP_SIZE_M": number} for number in range(size)]
    drawn = effort.sample(space, every)
    assert len(drawn) == -(-size // every)
    assert len({config["GROUP_SIZE_M"] for config in drawn}) == len(drawn)


def test_a_sample_leaves_no_group_size_out() -> None:
    space = [{"BLOCK_SIZE_N": n, "GROUP_SIZE_M": group} for n in range(50) for group in (1, 16, 32, 64)]
    assert {config["GROUP_SIZE_M"] for config in effort.sample(space, 4)} == {1, 16, 32, 64}


def test_a_line_is_noted_when_it_was_said_though_a_bar_ends_it_with_the_next_one(tmp_path: Path) -> None:
    script = (
        "import time; print('a'); print('\\rb', end=''); time.sleep(1); print('\\rc', end=''); print('\u00e9', end='')"
    )
    run = timed_run.timed([sys.executable, "-c", script], os.environ, tmp_path)
    assert [line.text for line in run.lines] == ["a", "b", "c\u00e9"]
    assert run.lines[1].at_s - run.lines[0].at_s < 0.5
    assert run.lines[2].at_s - run.lines[1].at_s > 0.9
    assert run.status == 0


def is_gone_within(seconds: float, pid: int) -> bool:
    """True where the process has ended, or waits for nothing but its parent."""
    stat = Path("/proc") / str(pid) / "stat"
    until = time.monotonic() + seconds
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_a_stopped_command_takes_what_it_started_with_it(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    run = timed_run.timed([sys.executable, "-c", script], os.environ, tmp_path, 1.5)
    assert run.status is None
    assert 1.5 <= run.seconds < 3
    assert is_gone_within(5, int(run.lines[0].text))


def test_a_daemon_that_is_left_running_does_not_hold_the_command_up(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys; child = subprocess.Popen(['sleep', '30'], start_new_session=True); print(child.pid)"
    )
    run = timed_run.timed([sys.executable, "-c", script], os.environ, tmp_path)
    os.kill(int(run.lines[0].text), signal.SIGKILL)
    assert (run.status, run.seconds < 10) == (0, True)


@pytest.mark.parametrize("name", ["GLM-4.7-Flash", "Qwen3-30B-A3B-FP8", "DeepSeek-V3", "Mixtral-8x7B"])
def test_a_built_in_model_is_the_same_as_a_folder(name: str, tmp_path: Path) -> None:
    model = model_folder.named(name)
    assert model is not None
    folder = model_folder.write(model, tmp_path)
    shape = ours.shape_of(["--model", str(folder)])
    assert (shape.hidden_size, shape.intermediate_size) == (model.hidden_size, model.intermediate_size)
    assert shape.quantization == model.quantization
    assert folder.name == name


def test_a_model_that_transformers_has_no_class_of_is_refused(tmp_path: Path) -> None:
    model = model_folder.named("MiMo-V2-Flash")
    assert model is not None
    with pytest.raises(ModelError, match="no config class for MiMoV2FlashForCausalLM; give a folder"):
        model_folder.write(model, tmp_path)


def test_a_form_that_one_line_of_a_config_does_not_say_is_refused(tmp_path: Path) -> None:
    model = model_folder.named("GLM-4.7-Flash-FP8")
    assert model is not None
    with pytest.raises(ModelError, match=r"fp8_w8a8 per channel: expected .* --per-channel-quant"):
        model_folder.write(model, tmp_path)


def test_upstream_runs_without_ours_and_with_absolute_paths(upstream: Path) -> None:
    found = theirs.found(upstream, {"PYTHONPATH": ".:/other"}, ray_stand_in=True)
    assert found.environment["SGLANG_MOE_EXT_DISABLE"] == "1"
    assert found.environment["HF_HUB_OFFLINE"] == "1"
    assert found.environment["PYTHONPATH"].split(os.pathsep) == [
        str(theirs.RAY_STAND_IN),
        str(upstream),
        str(Path.cwd()),
        "/other",
    ]


def test_upstream_is_told_the_scheme_that_it_does_not_read_itself(upstream: Path, tmp_path: Path) -> None:
    shape = MoEShape(8, 64, 64, 2, Quantization("fp8_w8a8", per_channel=True))
    task = theirs.Task(tmp_path, 2, 1, True, shape, 64)
    command = theirs._command(theirs.found(upstream, {}, ray_stand_in=False), task)
    assert command[command.index("--dtype") + 1] == "fp8_w8a8"
    assert {"--per-channel-quant", "--disable-shared-experts-fusion"} <= set(command)


STAND_IN_USED = """
import ray
from ray.experimental.tqdm_ray import tqdm
class Adder:
    def __init__(self, start, *, step):
        self.total, self.step = start, step
    def add(self, number):
        for _ in tqdm(range(number)):
            self.total += self.step
        return self.total
ray.init()
assert int(ray.available_resources()["GPU"]) == 1 and int(ray.get_gpu_ids()[0]) == 0
actor = ray.remote(num_gpus=1)(Adder).remote(5, step=2)
calls = [actor.add.remote(3), getattr(actor, "add").remote(1)]
print(ray.get(calls), ray.get(calls[0]))
try:
    ray.get(actor.add.remote("three"))
except TypeError:
    print("raised")
"""


def test_the_stand_in_for_ray_keeps_the_contract_that_upstreams_scripts_use() -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT / "benchmarks/ray_stand_in")}
    command = [sys.executable, "-c", STAND_IN_USED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == ["[11, 13] 11", "raised"]
    assert "3/3 [" in done.stderr
