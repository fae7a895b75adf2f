"""Does the plugin serve as stock does in each way that SGLang runs a model? Eager, CUDA graphs, torch.compile.

usage, from the repository root: python -m benchmarks.real_servers.server_modes
       [--cases eager graphs breakable piecewise compile] [--at-a-time 4] [--gpus 2] [--seconds 300]
       [--out FOLDER] [--json FILE]

For each case a stock server and one with the plugin with the same flags, of a dummy Qwen3-30B-A3B of few layers, whose
store has tables and kernel plans that nothing ships (`forced_tables`). `graphs`: decode steps from CUDA graphs;
`breakable` and `piecewise`: the prefill too, by SGLang's two ways; `compile`: decode steps by torch.compile.
Checked as in `tensor_parallel`. Takes 4 minutes on one GPU with 80 GB; SGLang 0.5.15, whose names of flags these are.
The status is 0 where all of that holds.
"""

from __future__ import annotations

import sys

from benchmarks.real_servers import pairs
from benchmarks.real_servers.pairs import Bench, Case
from benchmarks.real_servers.servers import NO_GRAPHS
from sglang_moe_ext.core import MoEExtError, MoEShape

_DECODE, _PREFILL = "--cuda-graph-backend-decode", "--cuda-graph-backend-prefill"
_FEW_GRAPHS = ("--cuda-graph-max-bs-decode", "4")
_SIZES = ("--cuda-graph-bs-prefill", "64", "256", "1024")
BENCH = Bench(
    "benchmarks.real_servers.server_modes",
    {
        "eager": Case(NO_GRAPHS),
        "graphs": Case((_DECODE, "full", _PREFILL, "disabled", *_FEW_GRAPHS)),
        "breakable": Case((_DECODE, "full", _PREFILL, "breakable", *_FEW_GRAPHS, *_SIZES), needs_plan=False),
        "piecewise": Case((_DECODE, "full", _PREFILL, "tc_piecewise", *_FEW_GRAPHS, *_SIZES), needs_plan=False),
        "compile": Case(
            (
                _DECODE,
                "full",
                _PREFILL,
                "disabled",
                *_FEW_GRAPHS,
                "--enable-torch-compile",
                "--torch-compile-max-bs",
                "2",
            ),
            needs_plan=False,
        ),
    },
    "qwen3_30b_a3b",
    (MoEShape(128, 768, 2048, 8),),
    (MoEShape(8, 32, 64, 2),),
)


if __name__ == "__main__":
    try:
        sys.exit(pairs.main(BENCH, sys.argv[1:], pairs.parser(BENCH, __doc__, seconds=300, at_a_time=4)))
    except MoEExtError as error:
        sys.exit(f"error: {error}")
