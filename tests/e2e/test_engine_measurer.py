"""The engine's own benchmark client is run once a case, and only a whole result of it is a figure."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.e2e.client import Client
from sglang_moe_ext.e2e.engine_measurer import EngineMeasurer
from sglang_moe_ext.e2e.measure import WARM_UPS, Cases
from sglang_moe_ext.engines import serving_benchmark
from sglang_moe_ext.engines.serving_benchmark import Load

RESULT = {
    "completed": 4,
    "request_throughput": 8.0,
    "output_throughput": 500.0,
    "mean_ttft_ms": 120.0,
    "std_ttft_ms": 3.0,
}
CASES = Cases((512,), prompts=4, batches=(4,), runs=2, decode_input=32, decode_output=128, seed=7)
BENCHMARK = """
import sys
print("starting")
text = {text!r}
if text is None:
    sys.exit("no such dataset")
open(sys.argv[1], "w").write(text)
"""

Measurers = Callable[[str | None], tuple[EngineMeasurer, list[Load]]]


@pytest.fixture
def measurer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measurers:
    """Sets what the benchmark writes, None: it fails; gives the loads that it was asked for."""

    def writing(text: str | None) -> tuple[EngineMeasurer, list[Load]]:
        (tmp_path / "benchmark_of_the_test.py").write_text(BENCHMARK.format(text=text))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        asked: list[Load] = []

        def words(url: str, load: Load, result: Path, model: str | None) -> list[str]:
            asked.append(load)
            return ["benchmark_of_the_test", str(result)]

        monkeypatch.setitem(serving_benchmark.WORDS, "sglang", words)
        return EngineMeasurer(Client("http://127.0.0.1:1", timeout_s=5)), asked

    return writing


def test_a_length_is_one_run_one_request_at_a_time(measurer: Measurers) -> None:
    by, asked = measurer(json.dumps(RESULT) + "\n")
    found = by.first_tokens(512, CASES, visit=0)
    assert (found.ttft_ms.mean, found.ttft_ms.count, found.requests_per_s) == (120.0, 4, 8.0)
    assert found.ttft_ms.deviation == pytest.approx(3.0 * (4 / 3) ** 0.5), "of a sample, not of all there are"
    assert asked == [Load(4, 1, 512, 1, WARM_UPS, asked[0].seed)]
    by.first_tokens(1024, CASES, visit=0)
    assert asked[0].seed != asked[1].seed, "prompts that begin alike are answered from a cache"


def test_a_batch_runs_as_often_as_asked_with_other_prompts(measurer: Measurers) -> None:
    by, asked = measurer(json.dumps(RESULT))
    assert by.decode(4, CASES, visit=1).values == (500.0, 500.0)
    assert [(load.concurrency, load.tokens_in, load.tokens_out) for load in asked] == [(4, 32, 128)] * 2
    assert asked[0].seed != asked[1].seed


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "failed .1.: no such dataset"),
        ("", "left no result"),
        ("[]", "left no result"),
        (json.dumps(RESULT | {"mean_ttft_ms": float("nan")}), "mean_ttft_ms is nan"),
        (json.dumps(RESULT | {"request_throughput": 0}), "request_throughput is 0"),
        (json.dumps(RESULT | {"completed": 3}), "3 of 4 requests"),
    ],
    ids=["fails", "empty", "a list", "nan", "nothing a second", "one lost"],
)
def test_a_benchmark_without_a_whole_result_is_told(measurer: Measurers, text: str | None, why: str) -> None:
    with pytest.raises(EngineError, match=why):
        measurer(text)[0].first_tokens(512, CASES, visit=0)


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_the_words_name_the_server_the_load_and_the_result(engine: Any) -> None:
    words = serving_benchmark.WORDS[engine]("http://a:1", Load(4, 2, 512, 1, 2, 7), Path("/out/result.json"), "m")
    given = dict(pairwise(words))
    assert given["--base-url"] == "http://a:1"
    assert (given["--num-prompts"], given["--max-concurrency"], given["--random-input-len"]) == ("4", "2", "512")
    assert any(word.endswith("result.json") for word in words)
