"""Small layers for the warp-specialized kernels in the simulator, with answers in float32 by a plain loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gluon_simulator
import torch
from torch import Tensor
from torch.nn.functional import silu

from sglang_moe_ext.kernel_plans import WarpSpecializedDown, WarpSpecializedUp
from sglang_moe_ext.kernels.warp_specialized_down import down_arguments, launch_down
from sglang_moe_ext.kernels.warp_specialized_up import launch_up, up_arguments

BLOCK = 128
STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "block": torch.float8_e4m3fn, "channel": torch.float8_e4m3fn}
RESULT = {"bf16": torch.bfloat16, "fp16": torch.float16, "block": torch.bfloat16, "channel": torch.bfloat16}


@dataclass(frozen=True)
class Sorted:
    """Pairs in blocks of 128 rows per expert, as the engine's sort leaves them."""

    ids: Tensor
    experts: Tensor
    padded: Tensor
    pairs: int

    @property
    def real(self) -> Tensor:
        """Mask of rows with a defined result."""
        rows = torch.arange(self.ids.numel())
        return (self.ids < self.pairs) & (self.experts[rows // BLOCK] >= 0) & (rows < int(self.padded[0]))


def sorted_pairs(topk_ids: Tensor, experts: int) -> Sorted:
    """With one block of buffer after the padding, whose entries must not be read."""
    pairs, ids, owners = topk_ids.numel(), [], []
    for expert in range(-1, experts):
        mine = (topk_ids.flatten() == expert).nonzero().flatten().tolist()
        mine += [pairs] * (-len(mine) % BLOCK)
        ids += mine
        owners += [expert] * (len(mine) // BLOCK)
    padded = torch.tensor([len(ids)], dtype=torch.int32)
    ids += [10**6] * BLOCK
    owners += [10**6]
    return Sorted(torch.tensor(ids, dtype=torch.int32), torch.tensor(owners, dtype=torch.int32), padded, pairs)


def routed(name: str, tokens: int, experts: int, top_k: int) -> Tensor:
    """[tokens, top_k]: "spread" gives expert 1 nothing, "one" all to expert 2, "elsewhere" half to other ranks."""
    scores = torch.rand(tokens, experts)
    if name == "spread":
        scores[:, 1] = -1.0
    ids = scores.topk(top_k, dim=1).indices
    if name == "one":
        return torch.full_like(ids, 2)
    return torch.where(ids < experts // 2, ids, -1) if name == "elsewhere" else ids


def interleaved(rows: Sorted) -> Sorted:
    """Blocks of expert -1 in the middle, as vLLM's map leaves them."""
    experts = rows.experts.clone()
    experts[1:-1:2] = -1
    return Sorted(rows.ids, experts, rows.padded, rows.pairs)


def operands(kind: str, rows: int, experts: int, columns: int, k: int) -> dict[str, Any]:
    """a, weights, their scales, and both as real float32 numbers."""
    a, weights = torch.randn(rows, k), torch.randn(experts, columns, k) / k**0.5
    stored = {"a": a.to(STORED[kind]), "weights": weights.to(STORED[kind]), "a_scale": None, "weight_scale": None}
    real_a, real_weights = stored["a"].float(), stored["weights"].float()
    if kind == "block":
        a_scale, scale = torch.rand(rows, k // 128) + 0.5, torch.rand(experts, -(-columns // 128), k // 128) + 0.5
        stored |= {"a_scale": a_scale, "weight_scale": scale}
        real_a = real_a * a_scale.repeat_interleave(128, 1)
        spread = scale.repeat_interleave(128, 1)[:, :columns].repeat_interleave(128, 2)
        real_weights = real_weights * spread
    if kind == "channel":
        a_scale, scale = torch.rand(rows, 1) + 0.5, torch.rand(experts, columns, 1) + 0.5
        stored |= {"a_scale": a_scale, "weight_scale": scale}
        real_a, real_weights = real_a * a_scale, real_weights * scale
    return stored | {"real_a": real_a, "real_weights": real_weights}


def up_error(
    kind: str,
    rows: Sorted,
    *,
    tokens: int,
    inner: int,
    k: int,
    config: WarpSpecializedUp,
    kernels: Any = None,
    seed: int = 0,
    **options: Any,
) -> float:
    """Largest error of the up projection relative to the largest result: simulated, or on a GPU (`kernels`)."""
    experts, top_k = 4, rows.pairs // tokens
    given = operands(kind, tokens, experts, 2 * inner, k)
    real_a, real_weights = given.pop("real_a"), given.pop("real_weights")
    is_block = kind == "block"
    out = torch.full((rows.ids.numel(), inner), float("nan")).to(STORED[kind] if is_block else RESULT[kind])
    out_scale = torch.full((inner // 128, rows.ids.numel()), float("nan")).T if is_block else None
    kernel, arguments = up_arguments(
        given["a"], given["weights"], out, rows.ids, rows.experts, rows.padded, config, pairs=rows.pairs, top_k=top_k,
        a_scale=given["a_scale"], weight_scale=given["weight_scale"], out_scale=out_scale,
        experts_elsewhere=bool((rows.experts < 0).any()),
    )  # fmt: skip
    if kernels == "gpu":
        c, c_scale = out.cuda(), None if out_scale is None else out_scale.T.cuda().T
        launch_up(
            given["a"].cuda(), given["weights"].cuda(), c, rows.ids.cuda(), rows.experts.cuda(), rows.padded.cuda(),
            config, pairs=rows.pairs, top_k=top_k, a_scale=_to_gpu(given["a_scale"]),
            weight_scale=_to_gpu(given["weight_scale"]), out_scale=c_scale,
            experts_elsewhere=bool((rows.experts < 0).any()),
        )  # fmt: skip
        out, out_scale = c.cpu(), None if c_scale is None else c_scale.cpu()
    else:
        views = {"w_desc": given["weights"].view(-1, k), "c_desc": out}
        _simulate(kernel, arguments, views, kernels, seed, options)
    wanted = torch.zeros(out.shape)
    for row in rows.real.nonzero().flatten().tolist():
        y = real_weights[rows.experts[row // BLOCK]] @ real_a[rows.ids[row] // top_k]
        wanted[row] = silu(y[:inner]) * y[inner:]
    got = out.float() if out_scale is None else out.float() * out_scale.repeat_interleave(128, 1)
    return _error(got, wanted, rows.real)


def down_error(
    kind: str,
    rows: Sorted,
    *,
    columns: int,
    k: int,
    config: WarpSpecializedDown,
    kernels: Any = None,
    seed: int = 0,
    **options: Any,
) -> float:
    """Largest error of the down projection relative to the largest result; as up_error. Padding of A is huge or NaN."""
    experts = 4
    given = operands(kind, rows.ids.numel(), experts, columns, k)
    real_a, real_weights = given.pop("real_a"), given.pop("real_weights")
    given["a"].view(torch.uint8)[~rows.real] = 0x7F
    out = torch.full((rows.ids.numel(), columns), float("nan")).to(RESULT[kind])
    kernel, arguments = down_arguments(
        given["a"], given["weights"], out, rows.experts, rows.padded, config,
        sorted_token_ids=rows.ids, pairs=rows.pairs, a_scale=given["a_scale"],
        weight_scale=given["weight_scale"], experts_elsewhere=bool((rows.experts < 0).any()),
    )  # fmt: skip
    if kernels == "gpu":
        c = out.cuda()
        launch_down(
            given["a"].cuda(), given["weights"].cuda(), c, rows.experts.cuda(), rows.padded.cuda(), config,
            sorted_token_ids=rows.ids.cuda(), pairs=rows.pairs, a_scale=_to_gpu(given["a_scale"]),
            weight_scale=_to_gpu(given["weight_scale"]), experts_elsewhere=bool((rows.experts < 0).any()),
        )  # fmt: skip
        out = c.cpu()
    else:
        views = {"a_desc": given["a"], "b_desc": given["weights"].view(-1, k), "c_desc": out}
        _simulate(kernel, arguments, views, kernels, seed, options)
    wanted = torch.zeros(out.shape)
    for row in rows.real.nonzero().flatten().tolist():
        wanted[row] = real_weights[rows.experts[row // BLOCK]] @ real_a[row]
    return _error(out.float(), wanted, rows.real)


def _simulate(
    kernel: Any, arguments: dict[str, Any], views: dict[str, Tensor], kernels: Any, seed: int, options: dict[str, Any]
) -> None:
    kernels = kernels or gluon_simulator.simulated()
    stand_ins = gluon_simulator.as_stand_ins(arguments, views)
    gluon_simulator.run(getattr(kernels, kernel.fn.__name__), stand_ins, programs=2, seed=seed, **options)


def _to_gpu(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.cuda()


def _error(got: Tensor, wanted: Tensor, real: Tensor) -> float:
    if not real.any():
        return 0.0
    return float((got - wanted)[real].abs().max() / wanted[real].abs().max())
