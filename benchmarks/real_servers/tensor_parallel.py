"""Does the plugin serve on two ranks as stock does? SGLang with TP 2, and with TP 2 and EP 2, on two GPUs.

usage, from the repository root: python -m benchmarks.real_servers.tensor_parallel [--cases tp2 tp2_ep2]
       [--requests 24] [--new-tokens 8] [--at-a-time 5] [--gpus 4] [--seconds 200] [--out FOLDER] [--json FILE]

For each case a stock server and one with the plugin, whose store has tables and kernel plans that nothing ships
(`forced_tables`); for the first case a third, stock with another tile, which says how far a tile alone changes
answers. The servers run beside each other, and answer the same prompts one by one.
Checked: both ranks say that the plugin is active, and name the same table; both sample the same tokens at every step;
the answers agree with those of stock as far as those of the other tile do.
Takes 2 minutes on two GPUs with 80 GB where the engine's kernels are compiled already; SGLang 0.5.15.
The status is 0 where all of that holds.
"""

from __future__ import annotations

import sys

from benchmarks.real_servers import forced_tables, pairs
from benchmarks.real_servers.pairs import Bench, Case
from benchmarks.real_servers.servers import MANY_RANKS, NO_GRAPHS
from sglang_moe_ext.core import MoEExtError, MoEShape

_TP, _EP = ("--tp", "2"), ("--ep-size", "2")
BENCH = Bench(
    "benchmarks.real_servers.tensor_parallel",
    {
        "tp2": Case((*_TP, *NO_GRAPHS, *MANY_RANKS), _TP, ranks=2),
        "tp2_ep2": Case((*_TP, *_EP, *NO_GRAPHS, *MANY_RANKS), (*_TP, *_EP), ranks=2, needs_plan=False),
    },
    "glm_4_7_flash",
    forced_tables.glm_layers(2),
    (MoEShape(8, 32, 64, 2), MoEShape(4, 64, 64, 2, ep=2)),  # of the tests' tiny model, padded on a CPU
    {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
)


if __name__ == "__main__":
    try:
        sys.exit(pairs.main(BENCH, sys.argv[1:], pairs.parser(BENCH, __doc__, seconds=200, at_a_time=5)))
    except MoEExtError as error:
        sys.exit(f"error: {error}")
