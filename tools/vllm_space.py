"""Print how many configurations vLLM's own tuner tries, for tests/tuning/search/test_rocm_space.py.

usage: python -m tools.vllm_space BENCHMARK_MOE_PY. The script lies in vLLM's sdist (benchmarks/kernels), in no wheel.
Only its functions of the space are run, on a made-up platform; neither vLLM nor Ray need be there.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FUNCTIONS = (
    "get_rocm_tuning_space",
    "get_xpu_tuning_space",
    "get_configs_compute_bound",
    "prune_rocm_search_space",
    "prune_rocm_configs",
    "need_split_k",
    "merge_unique_dicts",
)
LAYERS = ((1, 1536, 2048, 8), (16, 3072, 2048, 4), (64, 1536, 2048, 8), (1024, 28672, 4096, 2))
CASES = [
    (family, is_wide, tokens, columns, hidden, top_k)
    for family in ("CDNA", "RDNA")
    for is_wide in (True, False)
    for tokens, columns, hidden, top_k in LAYERS
]
"""Family, 16-bit weights, tokens, columns of the up GEMM, hidden size, top-k."""


def space_of(script: Path, family: str | None) -> dict[str, Any]:
    """The functions of the space, as on a GPU of that family; None: on CUDA."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    wanted: list[ast.stmt] = [it for it in tree.body if isinstance(it, ast.FunctionDef) and it.name in FUNCTIONS]
    names: dict[str, Any] = {
        "product": __import__("itertools").product,
        "current_platform": SimpleNamespace(is_rocm=lambda: family is not None, is_xpu=lambda: False),
        "on_cdna": lambda: family == "CDNA",
        "on_rdna": lambda: family == "RDNA",
        "WMMA_TILE": 16,
        "BenchmarkConfig": dict,
        "Any": Any,
    }
    exec(compile(ast.Module(wanted, []), str(script), "exec"), names)
    return names


def digest(configs: list[dict[str, int]]) -> str:
    """Of the set, whatever its order."""
    order = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "waves_per_eu")
    more = ("matrix_instr_nonkdim", "kpack")
    rows = sorted([*(it[name] for name in order), *(it.get(name, 0) for name in more)] for it in configs)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def main() -> None:
    script = Path(sys.argv[1])
    print("CUDA", len(space_of(script, None)["get_configs_compute_bound"](True, None)))
    for family, is_wide, tokens, columns, hidden, top_k in CASES:
        functions = space_of(script, family)
        space = functions["get_configs_compute_bound"](is_wide, None)
        left = functions["prune_rocm_search_space"](tokens, columns, hidden, space, is_wide, top_k)
        print((family, is_wide, tokens, columns, hidden, top_k), len(space), len(left), digest(left))


if __name__ == "__main__":
    main()
