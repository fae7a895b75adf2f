"""Each engine's own benchmark client of a server: its command line, and the figures of its result."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.untrusted import read_regular_file, show

_MOST_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Load:
    """So many requests, of which `concurrency` are on their way at once, each with tokens in and out."""

    requests: int
    concurrency: int
    tokens_in: int
    tokens_out: int
    warm_ups: int
    seed: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run found. Throughput in requests, and in generated tokens, a second; of `completed` requests."""

    completed: int
    requests_per_s: float
    tokens_per_s: float
    mean_ttft_ms: float
    deviation_ttft_ms: float


def sglang_words(url: str, load: Load, result: Path, model: str | None) -> list[str]:
    """For `python -m`. In 0.5.5 to 0.5.23; later it is `sglang.benchmark.serving`."""
    return [
        "sglang.bench_serving",
        *("--backend", "sglang", "--base-url", url, "--dataset-name", "random-ids", "--disable-tqdm"),
        *("--random-input-len", str(load.tokens_in), "--random-output-len", str(load.tokens_out)),
        *("--random-range-ratio", "1", "--num-prompts", str(load.requests)),
        *("--max-concurrency", str(load.concurrency), "--warmup-requests", str(load.warm_ups)),
        *("--seed", str(load.seed), "--output-file", str(result)),
    ]


def vllm_words(url: str, load: Load, result: Path, model: str | None) -> list[str]:
    """For `python -m`."""
    return [
        "vllm.entrypoints.cli.main",
        *("bench", "serve", "--backend", "vllm", "--base-url", url, "--dataset-name", "random", "--disable-tqdm"),
        *("--random-input-len", str(load.tokens_in), "--random-output-len", str(load.tokens_out), "--ignore-eos"),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)),
        *("--num-warmups", str(load.warm_ups), "--seed", str(load.seed), "--save-result"),
        *("--result-dir", str(result.parent), "--result-filename", result.name),
        *(() if model is None else ("--model", model)),
    ]


WORDS: dict[EngineName, Callable[[str, Load, Path, str | None], list[str]]] = {
    "sglang": sglang_words,
    "vllm": vllm_words,
}


def read(result: Path) -> Figures:
    """The last result that lies in that file, which has a JSON document a line, or one.

    Raises:
        EngineError: there is none.
    """
    try:
        found = json.loads(read_regular_file(result, _MOST_BYTES).strip().splitlines()[-1])
        return Figures(
            int(_figure(found, "completed")),
            _figure(found, "request_throughput"),
            _figure(found, "output_throughput"),
            _figure(found, "mean_ttft_ms"),
            _figure(found, "std_ttft_ms", is_positive=False),
        )
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise EngineError(f"the engine's benchmark left no result that can be read: {show(str(error))}") from error


def _figure(found: dict[str, object], name: str, *, is_positive: bool = True) -> float:
    value = found[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {show(value)}")
    if value < 0 or (is_positive and value == 0):
        raise ValueError(f"{name} is {value:g}")
    return float(value)
