"""What the commands that try real servers make of logs, answers, memory and tables, where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.real_servers import (
    answers,
    engine_tests,
    forced_tables,
    in_tests,
    load,
    lora,
    pairs,
    ranks,
    ray_tune,
    servers,
    tensor_parallel,
    vllm_server,
)
from benchmarks.real_servers.forced_tables import Here
from benchmarks.real_servers.load import Load, Sample
from benchmarks.real_servers.pairs import Answers, Case
from benchmarks.real_servers.ray_tune import Tuned
from sglang_moe_ext.core import EngineError, MoEShape, TileConfig
from sglang_moe_ext.engines.sglang import table_names
from sglang_moe_ext.serving import kernel_selection
from sglang_moe_ext.serving.table_search import TableDir
from sglang_moe_ext.tables import config_table, plan_table

STAMP = "[2026-11-27 13:14:00{}] {}"
ACTIVE = "sglang-moe-ext 0.1.0 is active in SGLang 0.5.15, by the entry point"
TABLE = "sglang-moe-ext: E=65: your table /store/E=65.json (origin unknown)"
LOADED = "sglang-moe-ext: the kernels of 1 plans are loaded for weights of (65, 3072, 2048)"
H100 = Here("NVIDIA H100 80GB HBM3", "3.6.0")


def of_ranks(*lines: str) -> dict[int, list[str]]:
    return {rank: list(lines) for rank in range(2)}


def plugin(**changed: object) -> Answers:
    values: dict[str, object] = {"lines": of_ranks(ACTIVE, TABLE, LOADED), "same_in_ranks": True}
    return Answers(1.0, [[1, 2]] * 10, **{**values, **changed})  # type: ignore[arg-type]


STOCK = Answers(1.0, [[1, 2]] * 10, {}, same_in_ranks=True)
TP2 = Case((), ranks=2)


def test_lines_are_told_by_the_rank_whose_log_they_are_in() -> None:
    log = "\n".join(
        [STAMP.format(" TP0", ACTIVE), STAMP.format(" TP1 EP1", ACTIVE), STAMP.format(" TP1", "another's"), ACTIVE]
    )
    assert ranks.lines_of_ranks(log) == {0: [ACTIVE], 1: [ACTIVE]}


def test_a_folder_of_our_name_in_a_line_of_the_engines_is_no_line_of_ours() -> None:
    engines = "Config file not found at /var/tmp/sglang-moe-ext-engine.gpu/sglang/configs/E=65.json"
    assert ranks.lines_of_ranks(STAMP.format(" TP0", engines)) == {}


def test_a_server_of_one_rank_marks_none() -> None:
    assert ranks.lines_of_ranks(STAMP.format("", ACTIVE)) == {0: [ACTIVE]}


def test_a_line_that_a_rank_is_still_writing_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "rank0.jsonl").write_text("[1]\n[2]\n")
    (tmp_path / "rank1.jsonl").write_text("[1]\n[2")
    assert ranks.sampled(tmp_path) == {0: [[1], [2]], 1: [[1]]}


def test_ranks_that_sampled_nothing_are_not_the_same() -> None:
    assert not ranks.is_same({}, 2)
    assert not ranks.is_same({0: [[1]]}, 2)
    assert not ranks.is_same({0: [[1]], 1: [[2]]}, 2)
    assert ranks.is_same({0: [[1]], 1: [[1]]}, 2)


def test_what_follows_a_different_token_does_not_count_as_equal() -> None:
    found = answers.compare([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5, 6]])
    assert found.first_tokens == 1
    assert found.tokens == pytest.approx(4 / 6)
    assert found.first_difference == (0, 1)


def test_answers_of_different_lengths_are_not_compared() -> None:
    with pytest.raises(EngineError, match="different numbers"):
        answers.compare([[1, 2]], [[1]])


def test_answers_must_agree_as_far_as_those_of_another_tile() -> None:
    stock = [[1]] * 10
    half, most = (answers.compare(stock, [[1]] * equal + [[2]] * (10 - equal)) for equal in (5, 9))
    assert answers.is_equal_enough(most, None)
    assert not answers.is_equal_enough(half, None)
    assert answers.is_equal_enough(half, control=half)
    assert not answers.is_equal_enough(half, control=most)


def test_a_pair_that_does_all_of_it_is_right() -> None:
    row = pairs.judge("tp2", TP2, STOCK, plugin(), None)
    assert row.wrong == []
    assert (row.active, row.plan) == (2, "loaded in 2 of 2")


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"lines": {0: [ACTIVE, TABLE, LOADED]}}, "1 of 2 ranks"),
        ({"lines": of_ranks(ACTIVE, LOADED)}, "no table"),
        ({"lines": {0: [ACTIVE, TABLE, LOADED], 1: [ACTIVE, LOADED]}}, "different tables"),
        ({"lines": of_ranks(ACTIVE, TABLE)}, "the kernel plan: none"),
        ({"same_in_ranks": False}, "sampled different tokens"),
    ],
)
def test_what_does_not_hold_of_a_pair_is_said(changed: dict[str, object], wrong: str) -> None:
    assert any(wrong in line for line in pairs.judge("tp2", TP2, STOCK, plugin(**changed), None).wrong)


def test_a_stock_server_with_the_plugin_is_no_comparison() -> None:
    row = pairs.judge("tp2", TP2, plugin(), plugin(), None)
    assert row.wrong == ["the stock server has the plugin"]


def test_a_server_that_failed_makes_its_case_wrong() -> None:
    asked = pairs.parser(tensor_parallel.BENCH, "", seconds=1, at_a_time=1).parse_args(["--cases", "tp2"])
    found = {"tp2_stock": STOCK, "tp2_plugin": EngineError("it died"), "tp2_other_tile": EngineError("it died")}
    (row,) = pairs.rows(tensor_parallel.BENCH, asked, found, is_cpu=False)
    assert row.wrong == ["plugin: it died"]


def test_servers_take_the_groups_of_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    visible = [servers.gpus_of(number, 2, 4)["CUDA_VISIBLE_DEVICES"] for number in range(3)]
    assert visible == ["0,1", "2,3", "0,1"]
    assert servers.gpus_of(0, 2, None) == {}


def test_an_error_of_one_job_is_no_error_of_another() -> None:
    def fails() -> int:
        raise EngineError("it died")

    found = servers.at_once({"good": lambda: 1, "bad": fails}, at_a_time=2)
    assert found["good"] == 1
    assert isinstance(found["bad"], EngineError)


def test_a_server_finds_the_forced_plan_of_each_layer(tmp_path: Path) -> None:
    shapes = forced_tables.glm_layers(2)
    forced_tables.write_store(tmp_path, shapes, H100)
    places = [TableDir("your", tmp_path / "tables" / "sglang")]
    for shape in shapes:
        plans = kernel_selection.load_plans(shape, H100.device_name, H100.triton, places)
        eager = kernel_selection.drop_short(plans)
        assert kernel_selection.select_plan(eager, 1024, shape) == forced_tables.PLAN
        assert kernel_selection.select_plan(eager, 64, shape) is None


def test_an_engines_tests_find_a_plan_for_each_hidden_size(tmp_path: Path) -> None:
    engine_tests.write_tables(tmp_path, "sglang", H100)
    places = [TableDir("your", tmp_path / "tables" / "sglang")]
    for hidden, top_k in ((128, 2), (1024, 6)):
        shape = MoEShape(8, 1024, hidden, top_k)
        plans = kernel_selection.load_plans(shape, H100.device_name, H100.triton, places)
        assert kernel_selection.select_plan(plans, 222, shape) == engine_tests.SIXTEEN_BITS


def test_growth_is_told_from_noise() -> None:
    flat = load.slope([(at, 100 + at % 3) for at in range(80)])
    grows = load.slope([(at, 100 + 2 * at + at % 3) for at in range(80)])
    assert flat is not None and flat.low < 0 < flat.high
    assert grows is not None and grows.low > load.MOST_GROWTH
    assert grows.value == pytest.approx(2, abs=0.1)


def test_of_few_samples_nothing_is_said() -> None:
    assert load.slope([(0, 1), (1, 2)]) is None


def test_a_failed_request_and_a_growing_server_are_wrong() -> None:
    outcomes = Load(Counter(answered=5, failed=1), ["status 500"])
    samples = [Sample(float(at), 100.0 + 9 * at, None) for at in range(40)]
    slopes, wrong = load.judge(outcomes, samples, ["Traceback"])
    assert slopes["GPU"] is None
    assert [line.split(":")[0] for line in wrong] == ["the host's memory grows", "1 requests failed", "the log"]


def test_the_processes_of_a_session_are_found() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        assert list(load.processes_of(child.pid)) == [child.pid]
        assert load.host_mib(child.pid) > 1
    finally:
        child.kill()
        child.wait()


def test_every_linear_layer_gets_a_pair_of_matrices() -> None:
    config = {
        "hidden_size": 64, "head_dim": 32, "moe_intermediate_size": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "num_experts": 8,
    }  # fmt: skip
    found = list(lora.modules(config))
    assert len(found) == 2 * (4 + 8 * 3)
    assert ("base_model.model.model.layers.1.mlp.experts.7.down_proj", 16, 64) in found
    assert ("base_model.model.model.layers.0.self_attn.o_proj", 128, 64) in found


def test_our_lines_of_vllms_log_have_no_stamp() -> None:
    log = f"(EngineCore pid=1) INFO 11-27 13:25:10 [x.py:1] {TABLE}\nINFO other\n{TABLE}"
    assert vllm_server.our_lines(log) == (TABLE,)


def test_the_table_of_vllms_server_asks_for_more_than_any_gpu_has() -> None:
    assert {m for m, tile in vllm_server.TABLE.items() if tile == forced_tables.TOO_LARGE} == {64, 128, 256}


TESTS = """
import unittest
import pytest
def test_passes(): pass
def test_fails(): assert False
@pytest.mark.skip(reason="why")
def test_skipped(): pass
class TestParts(unittest.TestCase):
    def test_parts(self):
        for part in (1, 2):
            with self.subTest(part=part):
                assert part == 1
"""


def test_tests_of_an_engine_are_counted_stock_beside_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    monkeypatch.setenv(in_tests.OUT, str(tmp_path))
    asked = engine_tests.parser().parse_args(["--seconds", "60"])
    clock = servers.Clock(60)
    stock = engine_tests.run(tmp_path / "tests", "test_it.py", tmp_path / "stock", asked, {}, clock)
    assert Counter(stock.outcomes.values())["passed"] >= 1
    assert [it for it in stock.outcomes if stock.outcomes[it] == "skipped"] == ["test_it.py::test_skipped"]
    assert "test_it.py::test_fails" in {it for it, outcome in stock.outcomes.items() if outcome == "failed"}
    assert any("part" in it and outcome == "failed" for it, outcome in stock.outcomes.items())
    row = engine_tests.compare("sglang", "test_it.py", stock, stock)
    assert row.differ == []
    assert "the plugin was not active" in row.wrong


def test_another_result_names_the_test() -> None:
    stock, ours = (
        engine_tests.Ran({"a": outcome, "b": "passed"}, {"a": "why"}, (ACTIVE,), 1, 0)
        for outcome in ("passed", "failed")
    )
    row = engine_tests.compare("sglang", "file", stock, ours)
    assert row.differ == ["a: passed, with the plugin failed why"]


def test_the_same_share_of_tests_is_drawn_each_time() -> None:
    names = [f"test[{number}]" for number in range(400)]
    drawn = [name for name in names if in_tests.is_drawn(name, 0.25)]
    assert 60 < len(drawn) < 140
    assert [name for name in names if in_tests.is_drawn(name, 1)] == names


def tuned(tile: TileConfig, us: float) -> Tuned:
    return Tuned(1.0, {"E=1.json": {1: forced_tables.TILE, 64: tile}}, {"E=1.json": {1: 10.0, 64: us}})


def test_another_choice_that_is_as_fast_is_as_good() -> None:
    one = tuned(forced_tables.TILE, 100.0)
    found = ray_tune.compare(one, tuned(forced_tables.TOO_LARGE, 103.0), within=0.05)
    assert (found.entries, found.equal, found.wrong) == (2, 1, [])
    slow = ray_tune.compare(one, tuned(forced_tables.TOO_LARGE, 120.0), within=0.05)
    assert slow.wrong == ["E=1.json M=64: Ray's choice takes +20.0%"]


def test_tables_of_another_layer_are_wrong() -> None:
    other = Tuned(1.0, {"E=2.json": {1: forced_tables.TILE}}, {})
    assert ray_tune.compare(tuned(forced_tables.TILE, 1.0), other, 0.05).wrong


def test_a_store_is_read_with_the_layers_times(tmp_path: Path) -> None:
    folder = tmp_path / "tables" / "sglang" / "triton_3_6_0"
    folder.mkdir(parents=True)
    shape = MoEShape(8, 128, 256, 2)
    path = folder / table_names.file_name(table_names.table_key(shape, H100.device_name))
    path.write_text(config_table.to_json({1: forced_tables.TILE}))
    plan_table.put(plan_table.path_beside(path), {})
    tables, figures = ray_tune.read(tmp_path)
    assert tables == {path.name: {1: forced_tables.TILE}}
    assert figures == {path.name: {}}


def test_processes_are_found_by_a_word_of_their_environment() -> None:
    word = f"real-servers-{os.getpid()}-{threading.get_ident()}"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={**os.environ, "X": word})
    try:
        assert child.pid in ray_tune.processes_that_name(word)
    finally:
        child.kill()
        child.wait()


def test_what_was_counted_of_a_file_of_tests_is_json(tmp_path: Path) -> None:
    ran = engine_tests.Ran({"a": "passed", "b": "failed"}, {"b": "why"}, (ACTIVE,), 1, 0)
    row = engine_tests.compare("sglang", "test_fused_moe.py", ran, ran)
    servers.save(tmp_path / "found.json", {"files": [asdict(row)]})
    assert json.loads((tmp_path / "found.json").read_text())["files"][0]["stock"] == {"passed": 1, "failed": 1}


def test_the_weights_under_an_adapter_are_all_that_the_model_has(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=96,
        moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, intermediate_size=64,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    lora.write_weights(tmp_path)
    _, found = Qwen3MoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert (set(found["missing_keys"]), set(found["unexpected_keys"])) == (set(), set())
