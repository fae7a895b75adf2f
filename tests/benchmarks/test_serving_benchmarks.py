"""The benchmarks of serving, with children that are stand-ins of our own.

The real children hold a model on a GPU, which the tests have not: the stand-ins are processes that speak their
protocol, a JSON document a line, and answer with figures made up here.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import lookup_cost, serving_speed, small_card
from benchmarks.serving import (
    answering,
    attached,
    children,
    dummy_weights,
    outputs,
    small_card_report,
    small_limit,
    speed_report,
)
from benchmarks.serving.cases import CASES, DECODE_CONTEXT, STEPS, WARM_UPS, Case, most_tokens
from benchmarks.serving.children import Child
from benchmarks.serving.outputs import Agreement, Distance
from benchmarks.serving.served_model import Plan
from benchmarks.serving.small_card_report import Ran, Row, Served
from benchmarks.serving.speed_report import Asked, Raced
from benchmarks.serving.turns import Times, take_turns
from benchmarks.serving.workloads import GLM_BF16, WORKLOADS, Workload, write_tables
from benchmarks.vs_upstream.report import Place
from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError, MoEShape, Quantization
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.tables import config_table
from tests.engines.installed import REPO_ROOT

PREFILL, DECODE = Case("prefill", 4096), Case("decode", 32)
PLACE = Place(
    find_gpu("H200"), SglangInstallation("0.5.15", Path("sglang"), "3.6.0"), "2026-11-21", "python -m benchmarks.it"
)
NEAR = Distance(2e-3, 5e-3, 1.0)
FP8_BLOCK = Workload("fp8", MoEShape(64, 1536, 2048, 4, Quantization("fp8_w8a8", (128, 128))))

MODEL_CHILD = """
import json, sys
name, is_active, order = sys.argv[1], sys.argv[2] == "active", sys.argv[3]
import numpy as np
for line in sys.stdin:
    request = json.loads(line)
    match request["do"]:
        case "load":
            answer = {"active": is_active, "attached_ms": 3.5 if is_active else None, "has_decode_graphs": True,
                      "seconds": 1.0}
        case "run":
            with open(order, "a") as file:
                print(name, request["kind"], request["size"], request["seed"], file=file)
            answer = {"ms": 30.0 if name == "stock" else 25.0}
        case "logits":
            np.savez(request["to"], prefill=np.eye(2, 8), decode=np.eye(2, 8))
            answer = {"pairs": [[3, 0, 1], [2, 1, 1]]}
        case "said":
            answer = {"lines": [f"{name} took a table"]}
    print(json.dumps(answer), flush=True)
"""
LAYER_CHILD = """
import json, sys
name = sys.argv[1]
for line in sys.stdin:
    request = json.loads(line)
    answer = {}
    if request["do"] == "load":
        answer = {"active": name == "plugin", "attached_ms": None}
    if request["do"] == "run":
        asked = ["128x256x64 G16 w8 s4"] * 2
        if name == "stock":
            answer = {"failure": f"OutOfResources: M={request['tokens']}", "looked_up": asked, "launched": []}
        else:
            answer = {"error_of_output": 4e-3, "looked_up": asked, "launched": ["128x128x64 G16 w8 s3"] * 2}
    print(json.dumps(answer), flush=True)
"""


def spoken(folder: Path, source: str, name: str = "stock", *arguments: str) -> Child:
    """A child that runs this source."""
    script = folder / f"{name}.py"
    script.write_text(source, encoding="utf-8")
    return Child(name, [sys.executable, str(script), name, *arguments], {}, folder / f"{name}.log")


def model_starter(folder: Path, **active: str) -> serving_speed.Start:
    """Stand-ins for both children; by default each is what its name says."""
    states = {"stock": "idle", "plugin": "active"} | active
    return lambda name, log: spoken(folder, MODEL_CHILD, name, states[name], str(folder / "order"))


def plan(folder: Path) -> Plan:
    """Of any model."""
    return serving_speed.plan_of(serving_speed.parser().parse_args([]), folder)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--runs", "4"], id="too few runs for an interval"),
        pytest.param(["--layers", "1"], id="a dense layer alone"),
        pytest.param(["--models", "Nobody"], id="an unknown model"),
        pytest.param(["--weights", "real"], id="unknown weights"),
    ],
)
def test_a_run_that_would_say_nothing_is_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        serving_speed.parser().parse_args(flags)
    assert refused.value.code == 2


def test_all_three_models_run_by_default() -> None:
    assert serving_speed.parser().parse_args([]).models == ["GLM-4.7-Flash", "Qwen3-30B-A3B", "Qwen3-30B-A3B-FP8"]


def test_decode_is_captured_for_the_batches_that_are_timed(tmp_path: Path) -> None:
    assert plan(tmp_path).decode_batches == (1, 32, 256)


def test_without_graphs_nothing_is_captured(tmp_path: Path) -> None:
    asked = serving_speed.parser().parse_args(["--eager-decode"])
    assert serving_speed.plan_of(asked, tmp_path).decode_batches == ()


def test_the_cache_holds_all_steps_of_the_largest_batch() -> None:
    steps = (7 + WARM_UPS) * STEPS
    assert most_tokens(7) >= 256 * (DECODE_CONTEXT + steps)


def test_the_cache_holds_the_longest_prompt() -> None:
    assert most_tokens(5, (Case("prefill", 16384), Case("decode", 1))) >= 16384


def test_the_child_that_goes_first_alternates() -> None:
    heard: list[str] = []
    stock, plugin = recorder("stock", heard), recorder("plugin", heard)
    take_turns(DECODE, stock, plugin, 3)
    assert heard[2 * WARM_UPS :] == ["stock 2", "plugin 2", "plugin 3", "stock 3", "stock 4", "plugin 4"]


def test_warm_ups_do_not_count() -> None:
    def slow_at_first(_: Case, number: int) -> float:
        return 900.0 if number < WARM_UPS else 30.0

    def quick(_: Case, number: int) -> float:
        return 25.0

    times = take_turns(PREFILL, slow_at_first, quick, 5)
    assert times == Times(PREFILL, (30.0,) * 5, (25.0,) * 5)


def recorder(name: str, heard: list[str]) -> Callable[[Case, int], float]:
    """A run that notes its turn."""

    def run(_: Case, number: int) -> float:
        heard.append(f"{name} {number}")
        return 1.0

    return run


def test_the_gain_is_that_of_the_pairs() -> None:
    """Each round is slower than the last, for both: only the pairs show that the plugin gains a fifth each time."""
    stock = tuple(1.2 * ms for ms in (10.0, 20.0, 40.0, 80.0, 160.0))
    gain = Times(PREFILL, stock, (10.0, 20.0, 40.0, 80.0, 160.0)).gain
    assert (gain.value, gain.low, gain.high) == pytest.approx((1.2, 1.2, 1.2))


def test_a_model_is_raced_in_turns_by_both_children(tmp_path: Path) -> None:
    found = serving_speed.raced("it", plan(tmp_path), 5, tmp_path, model_starter(tmp_path))
    assert [times.gain.value for times in found.times] == pytest.approx([1.2] * len(CASES))
    assert len((tmp_path / "order").read_text().splitlines()) == 2 * len(CASES) * (5 + WARM_UPS)


def test_what_both_children_said_is_kept(tmp_path: Path) -> None:
    found = serving_speed.raced("it", plan(tmp_path), 5, tmp_path, model_starter(tmp_path))
    assert found.said == {"stock": ("stock took a table",), "plugin": ("plugin took a table",)}


@pytest.mark.parametrize(
    ("child", "state", "complaint"),
    [
        pytest.param("plugin", "idle", "in the plugin child the hooks are not active", id="plugin without hooks"),
        pytest.param("stock", "active", "in the stock child the hooks are active", id="stock with hooks"),
    ],
)
def test_a_child_that_is_not_what_its_name_says_ends_the_race(
    tmp_path: Path, child: str, state: str, complaint: str
) -> None:
    with pytest.raises(EngineError, match=complaint) as raised:
        serving_speed.raced("it", plan(tmp_path), 5, tmp_path, model_starter(tmp_path, **{child: state}))
    assert "\n" not in str(raised.value)


def test_decode_steps_that_no_graph_replays_end_the_race(tmp_path: Path) -> None:
    source = MODEL_CHILD.replace('"has_decode_graphs": True', '"has_decode_graphs": False')
    with pytest.raises(EngineError, match="captured no CUDA graphs"):
        serving_speed.raced("it", plan(tmp_path), 5, tmp_path, lambda name, log: spoken(tmp_path, source, name, "", ""))


def test_a_child_that_dies_is_told_in_one_line_with_its_last_words(tmp_path: Path) -> None:
    source = "import sys; sys.stdin.readline(); sys.exit('first\\n\\nCUDA error: out of memory')"
    with pytest.raises(EngineError) as raised:
        spoken(tmp_path, source).ask("load")
    assert str(raised.value) == "the stock child died (1) at load: first | CUDA error: out of memory"


def test_a_child_that_died_between_two_requests_is_told(tmp_path: Path) -> None:
    child = spoken(tmp_path, "import sys; sys.stdin.readline(); print('{}', flush=True); sys.exit('gone')")
    child.ask("load")
    with pytest.raises(EngineError, match=r"died \(1\) at run: gone"):
        child.ask("run")


def test_what_a_dead_child_left_running_does_not_keep_us_waiting(tmp_path: Path) -> None:
    """As the engine's compile workers would: they hold the pipe open."""
    source = "import subprocess, sys; subprocess.Popen(['sleep', '30'], stderr=2); sys.exit('gone')"
    with pytest.raises(EngineError, match="gone"):
        spoken(tmp_path, source).ask("load")


def test_a_child_that_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "ANSWER_S", 0.2)
    child = spoken(tmp_path, "import sys; sys.stdin.read()")
    with pytest.raises(EngineError, match="did not load within 0 s"):
        child.ask("load")
    child.close()


def test_what_a_child_raises_is_its_answer(tmp_path: Path) -> None:
    child = answering_child(tmp_path)
    assert child.answer("fail") == {"error": "ValueError: no"}
    child.close()


def test_a_child_goes_on_after_it_raised(tmp_path: Path) -> None:
    child = answering_child(tmp_path)
    child.answer("fail")
    assert child.ask("echo", what=3)["what"] == 3
    child.close()


def test_what_an_engine_prints_is_no_answer(tmp_path: Path) -> None:
    child = answering_child(tmp_path)
    assert child.ask("print") == {}
    child.close()


def answering_child(folder: Path) -> Child:
    """A process with the real answering end."""
    source = f"""
import sys
sys.path.insert(0, {str(REPO_ROOT)!r})
from benchmarks.serving.answering import answer_all, take_standard_output
def fail(request): raise ValueError("no")
def echo(request): return request
def talk(request): print("max_total_num_tokens=1"); return {{}}
answer_all(take_standard_output(), {{"fail": fail, "echo": echo, "print": talk}})
"""
    return spoken(folder, source)


def test_stock_is_switched_off_and_the_plugin_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_MOE_EXT_DISABLE", "1")
    switches = [children.environment(stock=stock).get("SGLANG_MOE_EXT_DISABLE") for stock in (True, False)]
    assert switches == ["1", None]


def test_both_children_find_the_users_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.STORE, "/tables")
    assert {children.environment(stock=stock)[env.STORE] for stock in (True, False)} == {"/tables"}


def test_no_child_reads_a_folder_of_tables_that_we_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.SGLANG_CONFIG_DIR, "/tables")
    assert env.SGLANG_CONFIG_DIR not in children.environment(stock=True)


def test_the_distance_of_equal_logits_is_nothing() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 100)).astype(np.float32)
    assert outputs.distance(logits, logits) == Distance(0.0, 0.0, 1.0)


def test_one_request_that_took_another_expert_is_the_worst_and_not_the_median() -> None:
    stock = np.eye(5, 100, dtype=np.float32)
    plugin = stock.copy()
    plugin[3] = 0.0
    plugin[3, 50] = 1.0
    distance = outputs.distance(stock, plugin)
    assert (distance.median, distance.worst, distance.same_token) == pytest.approx((0.0, math.sqrt(2), 0.8))


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(EngineError, match="not finite"):
        outputs.distance(np.ones((1, 3)), np.array([[1.0, np.nan, 1.0]]))


def test_the_control_is_stock_with_another_tile(tmp_path: Path) -> None:
    tiles: list[Any] = []

    class Noted:
        def ask(self, do: str, **what: Any) -> dict[str, Any]:
            tiles.append(what["tile"])
            np.savez(what["to"], prefill=np.eye(2, 8) * len(tiles), decode=np.eye(2, 8))
            return {"pairs": [[3, 0, 1], [2, 1, 1]]}

    agreement = outputs.compared(Noted(), Noted(), tmp_path)  # type: ignore[arg-type]
    assert tiles == [None, None, outputs.OTHER_TILE]
    assert (agreement.prefill.median, agreement.other_tile.median, agreement.experts_taken) == (1.0, 2.0, 2)


RACED = Raced(
    "GLM-4.7-Flash",
    (Times(PREFILL, (29.5, 29.6, 29.4, 29.5, 29.7), (25.1, 25.2, 25.0, 25.1, 25.3)),),
    Agreement(NEAR, NEAR, NEAR, 64, 65),
    {"stock": ("Using default MoE kernel config.",), "plugin": ()},
    4.25,
)


def test_the_table_gives_medians_gain_and_spread() -> None:
    assert (
        "| prefill of 4,096 tokens | 29.50 | 25.10 | 1.175x | 1.174 to 1.176 | 29.40 to 29.70 | 25.00 to 25.30 |"
        in speed_report.table(RACED)
    )


@pytest.mark.parametrize(
    "fact", ["NVIDIA H200", "0.5.15", "3.6.0", "2026-11-21", "python -m benchmarks.it", "8 layers"]
)
def test_the_header_says_where_when_and_how(fact: str) -> None:
    assert fact in speed_report.header(PLACE, Asked(8, 7, "spread", decode_graphs=True))


def test_the_header_does_not_claim_graphs_that_were_not_captured() -> None:
    assert "steps without CUDA graphs" in speed_report.header(PLACE, Asked(8, 7, "spread", decode_graphs=False))


def test_an_attaching_that_nobody_measured_is_not_called_free() -> None:
    unmeasured = Raced(RACED.model, RACED.times, RACED.agreement, RACED.said, None)
    assert "a time that nobody measured" in speed_report.table(unmeasured)


def test_the_document_is_json_with_every_run() -> None:
    document = json.loads(json.dumps(speed_report.document(PLACE, Asked(8, 7, "spread", decode_graphs=True), [RACED])))
    assert document["models"][0]["times"][0]["plugin_ms"] == [25.1, 25.2, 25.0, 25.1, 25.3]


def filled(name: str, weights: torch.Tensor) -> torch.Tensor:
    """One parameter of that name, after the dummy weights were put in."""

    class Model:
        def state_dict(self) -> dict[str, torch.Tensor]:
            return {name: weights}

    dummy_weights.spread(Model())
    return weights


def test_sums_over_dummy_weights_neither_vanish_nor_grow() -> None:
    w1 = filled("experts.w13_weight", torch.empty(2, 256, 2048, dtype=torch.bfloat16))
    hidden = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    assert float((hidden @ w1[1].float().T).std()) == pytest.approx(1.0, rel=0.05)


def test_fp8_dummy_weights_times_their_scales_do_not_either() -> None:
    stored = filled("experts.w13_weight", torch.empty(2, 256, 2048).to(torch.float8_e4m3fn))
    scale = filled("experts.w13_weight_scale_inv", torch.empty(2, 2, 16))
    assert float(stored.float().std() * scale[0, 0, 0]) == pytest.approx(2048**-0.5, rel=0.05)


def test_dummy_weights_are_the_same_in_each_process_and_not_in_each_layer() -> None:
    first, again, other = (filled(name, torch.empty(2, 8, 16)) for name in ("layers.0.w", "layers.0.w", "layers.1.w"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("layers.1.input_layernorm.weight", 1.0, id="norm"),
        pytest.param("layers.1.mlp.gate.e_score_correction_bias", 0.0, id="no expert is preferred"),
    ],
)
def test_vectors_of_dummy_weights_change_nothing(name: str, value: float) -> None:
    assert filled(name, torch.full((64,), 7.0)).tolist() == [value] * 64


def test_a_users_table_lies_where_the_engine_looks(tmp_path: Path) -> None:
    write_tables(tmp_path, "NVIDIA H200", "3.6.0")
    path = tmp_path / "configs" / "triton_3_6_0" / "E=65,N=1536,device_name=NVIDIA_H200.json"
    assert set(config_table.read(path).values()) == {GLM_BF16.table}


def test_a_workload_without_a_table_meets_the_engines_default(tmp_path: Path) -> None:
    write_tables(tmp_path, "NVIDIA H200", "3.6.0")
    written = {path.name for path in (tmp_path / "configs" / "triton_3_6_0").iterdir()}
    assert len(written) == sum(workload.table is not None for workload in WORKLOADS)


def test_every_workload_runs_at_every_m_in_both_children(tmp_path: Path) -> None:
    rows = small_card.layers(101376, lambda name, module: spoken(tmp_path, LAYER_CHILD, name))
    assert [(row.workload.name, row.tokens) for row in rows] == [
        (workload.name, tokens) for workload in WORKLOADS for tokens in (1, 64, 1024, 4096, 16384)
    ]
    assert {(row.stock.failure is not None, row.plugin.is_right(row.workload)) for row in rows} == {(True, True)}


def loading(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], int]:
    """On a simulated small card, load a kernel of that name that needs so many bytes; the limit that it met.

    There is no GPU: the stand-ins are the two names of Triton that hold the limit.
    """

    class Kernel:
        def __init__(self, name: str, needs: int) -> None:
            self.name, self.needs = name, needs

        def _init_handles(self) -> int:
            limit: int = compiler.max_shared_mem(0)
            if self.needs > limit:
                raise MemoryError(self.name)
            return limit

    utilities = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 232448, "warpSize": 32})
    driver = SimpleNamespace(driver=SimpleNamespace(active=SimpleNamespace(utils=utilities)))
    compiler: Any = SimpleNamespace(CompiledKernel=Kernel, max_shared_mem=lambda device: 232448)
    monkeypatch.setitem(sys.modules, "triton.runtime.driver", driver)
    monkeypatch.setitem(sys.modules, "triton.compiler.compiler", compiler)
    small_limit.simulate(101376)
    assert utilities.get_device_properties(0) == {"max_shared_mem": 101376, "warpSize": 32}
    return lambda name, needs: Kernel(name, needs)._init_handles()


def test_a_small_card_refuses_a_large_moe_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    load = loading(monkeypatch)
    with pytest.raises(MemoryError):
        load("fused_moe_kernel", 196608)


def test_a_small_card_loads_a_moe_kernel_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading(monkeypatch)("fused_moe_kernel_gptq_awq", 98304) == 101376


def test_other_kernels_keep_the_limit_of_the_card_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    load = loading(monkeypatch)
    load("fused_moe_kernel", 1)
    assert load("_fwd_kernel", 196608) == 232448


def test_the_triton_that_is_installed_has_what_the_simulation_replaces() -> None:
    compiler: Any = importlib.import_module("triton.compiler.compiler")
    assert callable(compiler.CompiledKernel._init_handles)
    assert callable(compiler.max_shared_mem)
    assert hasattr(importlib.import_module("triton.runtime.driver"), "driver")


REFUSED = Ran(("128x256x64 G16 w8 s4",) * 2, (), failure="OutOfResources: Required: 196608 | 101376")
FITTED = Ran(("128x256x64 G16 w8 s4",) * 2, ("128x128x64 G16 w8 s3",) * 2, error=4.1e-3)


def test_the_small_cards_table_tells_what_was_asked_and_what_ran() -> None:
    assert small_card_report.table([Row(GLM_BF16, 64, REFUSED, FITTED)]).splitlines()[-1] == (
        "| GLM-4.7-Flash bf16 | a table for a big card | 64 | fails: OutOfResources: Required: 196608 / 101376 "
        "| runs | 128x256x64 G16 w8 s4 | 128x128x64 G16 w8 s3 | 4.1e-03 |"
    )


def test_a_wrong_result_is_not_called_a_run() -> None:
    wrong = Ran((), ("128x128x64 G16 w8 s3",), error=0.7)
    assert "runs, and is WRONG" in small_card_report.table([Row(FP8_BLOCK, 64, wrong, FITTED)])


@pytest.mark.parametrize(
    ("plugin", "served", "is_good"),
    [
        pytest.param(FITTED, Served((30.0, 25.0)), True, id="all runs"),
        pytest.param(REFUSED, Served((30.0, 25.0)), False, id="a layer fails"),
        pytest.param(FITTED, Served(failure="OutOfResources"), False, id="the model fails"),
    ],
)
def test_the_small_card_is_served_only_if_all_of_it_is(
    plugin: Ran, served: Served, is_good: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row(GLM_BF16, 64, REFUSED, plugin)]
    of_models = {"stock": Served(failure="OutOfResources"), "plugin": served}
    assert small_card.told(PLACE, 101376, rows, of_models) == is_good
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["limit"] == 101376


def test_a_crash_of_the_whole_model_is_an_answer(tmp_path: Path) -> None:
    child = spoken(tmp_path, 'print(input() and \'{"error": "OutOfResources: no"}\', flush=True)')
    assert small_card._prefilled(child) == Served(failure="OutOfResources: no")
    child.close()


def test_the_cost_of_a_lookup_stands_beside_that_of_stock() -> None:
    answers: dict[str, dict[str, Any]] = {
        "stock": {"us": {"GLM": {"one entry": 3.6}}, "attached_ms": None},
        "plugin": {"us": {"GLM": {"one entry": 0.8}}, "attached_ms": 12.0},
    }
    table = lookup_cost.table(answers)
    assert "| GLM | one entry | 3.60 | 0.80 |" in table
    assert "Attaching took 12.0 ms." in table


def test_a_function_of_the_engine_is_told_from_ours(tmp_path: Path) -> None:
    def wrapped() -> None:
        """Ours, whatever name it goes by."""

    assert not attached._is_the_engines(wrapped, tmp_path)
    assert attached._is_the_engines(answering.answer_all, Path(answering.__file__).parent)


def test_the_startup_file_that_a_child_runs_is_there() -> None:
    assert list(attached.PACKAGING.glob("*.pth"))
