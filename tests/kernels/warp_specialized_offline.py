"""Warp-specialized kernels compiled for a Hopper GPU that need not be here, in the shapes of real layers."""

from __future__ import annotations

import copy
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.backends.nvidia
from torch import Tensor

from sglang_moe_ext.core import Target
from sglang_moe_ext.kernel_plans import WarpSpecializedDown, WarpSpecializedUp
from sglang_moe_ext.kernels.compiled import TargetOnlyDriver
from sglang_moe_ext.kernels.warp_specialized_down import down_arguments
from sglang_moe_ext.kernels.warp_specialized_up import up_arguments

STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "block": torch.float8_e4m3fn, "channel": torch.float8_e4m3fn}


def up(kind: str, config: WarpSpecializedUp, *, elsewhere: bool = False) -> tuple[Any, dict[str, Any]]:
    """Kernel and arguments of the up projection of Qwen3-30B-A3B, without storage."""
    tokens, top_k, experts, hidden, inner = 4096, 8, 128, 2048, 768
    out_dtype = torch.float8_e4m3fn if kind == "block" else _result(kind)
    with torch.device("meta"):
        rows = tokens * top_k + experts * 127
        return up_arguments(
            torch.empty(tokens, hidden, dtype=STORED[kind]),
            torch.empty(experts, 2 * inner, hidden, dtype=STORED[kind]),
            torch.empty(rows, inner, dtype=out_dtype),
            *_sorted(rows),
            config,
            pairs=tokens * top_k,
            top_k=top_k,
            a_scale=_a_scale(kind, tokens, hidden),
            weight_scale=_weight_scale(kind, experts, 2 * inner, hidden),
            out_scale=torch.empty(inner // 128, rows).T if kind == "block" else None,
            experts_elsewhere=elsewhere,
        )


def down(kind: str, config: WarpSpecializedDown, *, elsewhere: bool = False) -> tuple[Any, dict[str, Any]]:
    """Kernel and arguments of the down projection of Qwen3-30B-A3B, without storage."""
    tokens, top_k, experts, hidden, inner = 4096, 8, 128, 2048, 768
    with torch.device("meta"):
        rows = tokens * top_k + experts * 127
        ids, owners, padded = _sorted(rows)
        return down_arguments(
            torch.empty(rows, inner, dtype=STORED[kind]),
            torch.empty(experts, hidden, inner, dtype=STORED[kind]),
            torch.empty(rows, hidden, dtype=_result(kind)),
            owners,
            padded,
            config,
            sorted_token_ids=ids,
            pairs=tokens * top_k,
            a_scale=torch.empty(inner // 128, rows).T if kind == "block" else _a_scale(kind, rows, inner),
            weight_scale=_weight_scale(kind, experts, hidden, inner),
            experts_elsewhere=elsewhere,
        )


def compiled(kernel: Any, named: dict[str, Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", TargetOnlyDriver(Target(90)))
        patch.setattr(kernel, "device_caches", copy.copy(kernel.device_caches))
        return kernel.warmup(**named, grid=(1,))


def machine_code(kernel: Any) -> str:
    """SASS, by the nvdisasm of Triton's wheel."""
    nvdisasm = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(kernel.asm["cubin"])
        binary.flush()
        return subprocess.run([nvdisasm, "-c", binary.name], capture_output=True, text=True, check=True).stdout


def local_accesses(sass: str) -> int:
    """Loads and stores of local memory: spills."""
    return len(re.findall(r"\b(?:LDL|STL)\b", sass))


def barriers_chosen_outside(ttgir: str) -> tuple[int, set[str]]:
    """How many loops over k there are, and their barriers that are the same in every step of such a loop.

    Triton 3.6 to 3.8 make one of two names of one value that a loop assigns both (`last = slot` before it): each stage
    was given back as the tile's first, and the GPU hung. Python's meaning, and so the simulator, does not show it.
    """
    loops, outside = 0, set()
    for loop in re.finditer(r"^( *)(?:%\S+ = )?scf\.for %k(?:_\d+)? = .*?^\1}", ttgir, re.MULTILINE | re.DOTALL):
        head, *body = loop[0].splitlines()
        varying = {re.findall(r"scf\.for (%\w+)", head)[0], *re.findall(r"(%\w+) = %\w+(?=[,)])", head)[1:]}
        varying |= set(re.findall(r"iter_args\((%\w+)", head))
        for line in body:
            made = re.match(r" *(%\w+)(?::\d+)? = (.*)", line)
            if made is not None and varying & set(re.findall(r"%\w+", made[2])):
                varying.add(made[1])
        used = set(re.findall(r"ttng\.(?:wait_barrier|arrive_barrier|barrier_expect) (%\w+)", loop[0]))
        loops, outside = loops + 1, outside | (used - varying)
    return loops, outside


def _result(kind: str) -> torch.dtype:
    return torch.float16 if kind == "fp16" else torch.bfloat16


def _sorted(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(n, dtype=torch.int32) for n in (rows, rows // 128, 1))  # type: ignore[return-value]


def _a_scale(kind: str, rows: int, k: int) -> Tensor | None:
    return {"block": torch.empty(rows, k // 128), "channel": torch.empty(rows, 1)}.get(kind)


def _weight_scale(kind: str, experts: int, rows: int, k: int) -> Tensor | None:
    shapes = {"block": (experts, rows // 128, k // 128), "channel": (experts, rows, 1)}
    return torch.empty(shapes[kind]) if kind in shapes else None
