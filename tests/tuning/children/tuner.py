"""Child of the tests that kill: goes on with the newest unfinished run, or begins one, until the strategy is through.

Arguments: file to which each request that reaches the GPU is added before it is answered; batch sizes. Says "ready"
when it holds the run; its last line of stdout is the strategy's result.
"""

from __future__ import annotations

import os
import sys

from sglang_moe_ext.tuning.bench.messages import BenchRequest, BenchResult
from sglang_moe_ext.tuning.run import run_folder
from tests.tuning.journal_strategies import answer_of, halving

CIRCUMSTANCES = {"gpu": "table", "seed": 0}


def main(asked: str, last: str) -> None:
    descriptor = os.open(asked, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def gpu(request: BenchRequest) -> BenchResult:
        os.write(descriptor, f"{request!r}\n".encode())
        return answer_of(request)

    path = run_folder.unfinished(CIRCUMSTANCES)
    with run_folder.begin(CIRCUMSTANCES) if path is None else run_folder.resume(CIRCUMSTANCES, path) as run:
        print("ready", flush=True)
        measure = run.journal.through(gpu)
        results = [halving(measure, tokens) for tokens in range(1, int(last) + 1)]
        run.finish()
    print(results)


if __name__ == "__main__":
    main(*sys.argv[1:])
