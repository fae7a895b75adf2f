"""Measure a server by the engine's own benchmark client, in a process of its own for each case."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.e2e.client import Client
from sglang_moe_ext.e2e.measure import WARM_UPS, Cases, FirstTokens, Sample, sample
from sglang_moe_ext.engines import serving_benchmark
from sglang_moe_ext.engines.serving_benchmark import Figures, Load
from sglang_moe_ext.untrusted import show

_START_S = 300.0
_SHOWN = 400
_LARGEST_SEED = 2**31


@dataclass(frozen=True, slots=True)
class EngineMeasurer:
    """By `sglang.bench_serving` or `vllm bench serve`; `client` says where the server is, and its limit a request."""

    client: Client

    def first_tokens(self, tokens: int, cases: Cases, visit: int) -> FirstTokens:
        found = self._run(Load(cases.prompts, 1, tokens, 1, WARM_UPS, _seed(cases, visit, tokens)))
        # It divides by the number of values, a sample by one less.
        unbiased = math.sqrt(found.completed / (found.completed - 1)) if found.completed > 1 else 0.0
        ttft = Sample(found.mean_ttft_ms, found.deviation_ttft_ms * unbiased, found.completed)
        return FirstTokens(ttft, found.requests_per_s)

    def decode(self, batch: int, cases: Cases, visit: int) -> Sample:
        seed = _seed(cases, visit, batch)
        loads = [
            Load(batch, batch, cases.decode_input, cases.decode_output, 1, seed + run) for run in range(cases.runs)
        ]
        return sample([self._run(load).tokens_per_s for load in loads])

    def _run(self, load: Load) -> Figures:
        """Raises EngineError where the client fails, or some request did."""
        limit_s = _START_S + self.client.timeout_s * (load.warm_ups + load.requests / load.concurrency)
        key = {} if self.client.api_key is None else {"OPENAI_API_KEY": self.client.api_key}
        with tempfile.TemporaryDirectory(prefix="sglang_moe_ext-") as folder:
            result, log = Path(folder, "result.json"), Path(folder, "log")
            words = serving_benchmark.WORDS[self.client.api.engine](self.client.url, load, result, self.client.model)
            try:
                with log.open("wb") as out:
                    done = subprocess.run(
                        [sys.executable, "-W", "ignore", "-m", *words],
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        timeout=limit_s,
                        env={**os.environ, **key},
                        check=False,
                    )
            except subprocess.TimeoutExpired:
                raise EngineError(f"the engine's benchmark did not end within {limit_s:.0f} s") from None
            if done.returncode != 0:
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
                raise EngineError(f"the engine's benchmark failed ({done.returncode}): {show(lines[-1], _SHOWN)}")
            found = serving_benchmark.read(result)
        if found.completed != load.requests:
            raise EngineError(f"{found.completed} of {load.requests} requests of the engine's benchmark were answered")
        return found


def _seed(cases: Cases, visit: int, case: int) -> int:
    """Another one for each case of each visit: prompts that begin alike would be answered from a cache of prefixes."""
    return random.Random(f"{cases.seed} {visit} {case}").randrange(_LARGEST_SEED)
