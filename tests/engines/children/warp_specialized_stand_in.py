"""The launchers of the warp-specialized kernels in torch, since Gluon has no interpreter on a CPU.

They hold the layer to the contract of the real launchers: blocks of 128 rows, the shapes and types of the scales. Rows
of padding and of experts elsewhere are left as they are, so that a layer that reads them shows it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sglang_moe_ext.kernel_plans import WarpSpecializedDown, WarpSpecializedUp

BLOCK = 128
calls: list[str] = []


def put_in_place() -> None:
    """Before anything imports the real modules."""
    for name, launch in (("up", launch_up), ("down", launch_down)):
        module = ModuleType(f"sglang_moe_ext.kernels.warp_specialized_{name}")
        setattr(module, f"launch_{name}", launch)
        sys.modules[module.__name__] = module


def real(values: Tensor, scale: Tensor | None) -> Tensor:
    """float32 of rows, or of one expert's weights."""
    if scale is None:
        return values.float()
    rows, columns = (size // of for size, of in zip(values.shape, scale.shape, strict=True))
    return values.float() * scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def blocks(ids: Tensor, experts: Tensor, padded: Tensor, pairs: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, real rows, their pairs) of each block of an expert that is here."""
    assert int(padded) % BLOCK == 0
    for block in range(int(padded) // BLOCK):
        rows = torch.arange(block * BLOCK, (block + 1) * BLOCK)
        rows = rows[ids[rows] < pairs]
        if experts[block] >= 0:
            yield int(experts[block]), rows, ids[rows].long()


def launch_up(
    a: Tensor, weights: Tensor, out: Tensor, ids: Tensor, experts: Tensor, padded: Tensor, config: WarpSpecializedUp,
    *, pairs: int, top_k: int, a_scale: Tensor | None, weight_scale: Tensor | None, out_scale: Tensor | None,
    experts_elsewhere: bool,
) -> None:  # fmt: skip
    calls.append(str(config))
    is_block_wise = weight_scale is not None and weight_scale.shape[1] < weights.shape[1]
    assert (out.dtype == torch.float8_e4m3fn) == is_block_wise == (out_scale is not None)
    assert a.dtype == weights.dtype
    assert experts_elsewhere or bool((experts[: int(padded) // BLOCK] >= 0).all())
    for expert, rows, of_pairs in blocks(ids, experts, padded, pairs):
        tokens = of_pairs // top_k
        x = real(a[tokens.tolist()] if a_scale is None else _picked(a, tokens), _rows_of(a_scale, tokens))
        w = real(weights[expert], None if weight_scale is None else weight_scale[expert])
        gate, up = (x @ w.T).chunk(2, dim=1)
        inner = torch.nn.functional.silu(gate) * up
        if out_scale is None:
            out[rows] = inner.to(out.dtype)
            continue
        groups = inner.view(len(rows), -1, BLOCK)
        scale = groups.abs().amax(-1).clamp(min=1e-10) / 448
        out.view(torch.uint8)[rows] = (groups / scale[..., None]).view(inner.shape).to(out.dtype).view(torch.uint8)
        out_scale[rows] = scale


def launch_down(
    a: Tensor, weights: Tensor, out: Tensor, experts: Tensor, padded: Tensor, config: WarpSpecializedDown,
    *, sorted_token_ids: Tensor, pairs: int, a_scale: Tensor | None, weight_scale: Tensor | None,
    experts_elsewhere: bool,
) -> None:  # fmt: skip
    calls.append(str(config))
    assert a.dtype == weights.dtype
    assert experts_elsewhere or bool((experts[: int(padded) // BLOCK] >= 0).all())
    for expert, rows, _ in blocks(sorted_token_ids, experts, padded, pairs):
        x = real(a[rows] if a_scale is None else _picked(a, rows), _rows_of(a_scale, rows))
        out[rows] = (x @ real(weights[expert], None if weight_scale is None else weight_scale[expert]).T).to(out.dtype)


def _picked(values: Tensor, rows: Tensor) -> Tensor:
    return values.view(torch.uint8)[rows].view(values.dtype)


def _rows_of(scale: Tensor | None, rows: Tensor) -> Any:
    return None if scale is None else scale[rows]
