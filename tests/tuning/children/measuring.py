"""Child of the tests that kill: measures a layer in the newest unfinished run, or in a new one, to the end.

Arguments: the layer; a file to which each request that reaches the GPU is added before it is answered; seconds an
answer; batch sizes. Says "ready" when it holds the run; its last line of stdout is what was chosen for each of them.
The GPU is a formula.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sglang_moe_ext.tuning.bench.messages import BenchRequest, BenchResult
from sglang_moe_ext.tuning.run import run_folder
from tests.tuning.recorded_runs import TODAY, ReplayingStation, formula, measured


def main(layer: str, asked: Path, seconds: float, tokens: list[int]) -> None:
    descriptor = os.open(asked, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def gpu(request: BenchRequest) -> BenchResult:
        os.write(descriptor, f"{request!r}\n".encode())
        return formula(request)

    circumstances = {"layer": layer}
    folder = run_folder.unfinished(circumstances)
    with run_folder.begin(circumstances) if folder is None else run_folder.resume(circumstances, folder) as run:
        print("ready", flush=True)
        results = measured(
            layer, run.journal, [ReplayingStation(gpu, seconds=seconds)], tokens, today=dict.fromkeys(tokens, TODAY)
        )
        run.finish()
    print(results)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), [int(each) for each in sys.argv[4:]])
