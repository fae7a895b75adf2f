"""Warp-specialized kernels of one layer against our Triton kernels and DeepGEMM: error, microseconds, TFLOP/s.

usage, from the repository root: python -m benchmarks.warp_specialized [--layers NAME ...] [--batch-size M ...]
    [--routing uniform zipf] [--rounds 12] [--select WORD] [--check]

Cold L2 before each launch, launches queued behind a sleeping GPU, candidates in turn in every round, medians. TFLOP/s
count rows of real pairs: padding counts against a kernel. Errors are against float32 on sampled blocks, with outputs
filled with NaN before. Each layer runs in a process with a time limit; `--check` runs each kernel once, in small, in a
process of its own. DeepGEMM (`deep_gemm`, if it imports) multiplies rows that were gathered before, with no activation
and no quantization: a bound for the product alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

BLOCK = 128
FLUSHED_BYTES = 1 << 28
SAMPLED_BLOCKS = 6
TIMEOUT_S, CHECK_TIMEOUT_S = 200, 60


@dataclass(frozen=True, slots=True)
class Layer:
    """Experts of one layer; `scheme` is "none", "block" or "channel"."""

    experts: int
    hidden: int
    inner: int
    top_k: int
    scheme: str = "none"


LAYERS = {
    "Qwen3-30B-A3B fp8 block": Layer(128, 2048, 768, 8, "block"),
    "DeepSeek-V3 TP8 fp8 block": Layer(257, 7168, 256, 9, "block"),
    "GLM-4.7-Flash bf16": Layer(65, 2048, 1536, 5),
    "Qwen3-30B-A3B bf16": Layer(128, 2048, 768, 8),
    "Qwen3-30B-A3B fp8 channel": Layer(128, 2048, 768, 8, "channel"),
}
TOKENS = (1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kernel of one stage. `launch` writes `out`; `values` turns it into float32 of some rows, None: not checked."""

    stage: str
    name: str
    launch: Callable[[], object]
    values: Callable[[Tensor], Tensor] | None = None
    poison: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Sorted:
    """Pairs in blocks of `block` rows per expert; `ids` of padding are the number of pairs."""

    ids: Tensor
    experts: Tensor
    padded: Tensor
    block: int


def routed(layer: Layer, tokens: int, routing: str) -> Tensor:
    """[tokens, top_k] of distinct experts, uniform or by popularity 1 / rank."""
    weights = torch.ones(layer.experts, device="cuda")
    if routing == "zipf":
        weights = 1.0 / torch.arange(1, layer.experts + 1, device="cuda")
    return torch.multinomial(weights.expand(tokens, -1), layer.top_k)


def sorted_pairs(topk_ids: Tensor, experts: int, block: int) -> Sorted:
    """What the engine's sort leaves."""
    ids = topk_ids.flatten()
    order = ids.argsort(stable=True)
    counts = ids.bincount(minlength=experts)
    padded = (counts + block - 1) // block * block
    start = padded.cumsum(0) - padded
    place = start[ids[order]] + torch.arange(len(ids), device=ids.device) - (counts.cumsum(0) - counts)[ids[order]]
    total = int(padded.sum())
    sorted_ids = torch.full((total,), len(ids), dtype=torch.int32, device=ids.device)
    sorted_ids[place] = order.int()
    owners = torch.repeat_interleave(torch.arange(experts, device=ids.device), padded // block).int()
    return Sorted(sorted_ids, owners, torch.tensor([total], dtype=torch.int32, device=ids.device), block)


def quantized(x: Tensor, scheme: str) -> tuple[Tensor, Tensor | None]:
    """Rows as the layer's GEMM reads them, and their scales."""
    if scheme == "none":
        return x, None
    groups = x.float().view(x.shape[0], -1, 128 if scheme == "block" else x.shape[1])
    scale = groups.abs().amax(-1).clamp(min=1e-10) / 448
    return (groups / scale[..., None]).view(x.shape).to(torch.float8_e4m3fn), scale


def random_weights(layer: Layer, rows: int, k: int) -> tuple[Tensor, Tensor | None]:
    """[E, rows, k], made expert by expert."""
    dtype = torch.bfloat16 if layer.scheme == "none" else torch.float8_e4m3fn
    weights = torch.empty(layer.experts, rows, k, device="cuda", dtype=dtype)
    for expert in weights:
        expert.copy_(torch.randn(rows, k, device="cuda") / k**0.5)
    shapes = {"none": None, "block": (layer.experts, rows // 128, k // 128), "channel": (layer.experts, rows, 1)}
    shape = shapes[layer.scheme]
    return weights, None if shape is None else torch.rand(shape, device="cuda") + 0.5


def real(values: Tensor, scale: Tensor | None) -> Tensor:
    """float32 of rows, or of one expert's weights, with their scales."""
    if scale is None:
        return values.float()
    spread = scale.repeat_interleave(values.shape[1] // scale.shape[1], 1)
    return values.float() * spread.repeat_interleave(values.shape[0] // scale.shape[0], 0)


class Race:
    """One layer at one M."""

    def __init__(self, layer: Layer, tokens: int, routing: str, weights: tuple[Any, ...]) -> None:
        self.layer, self.tokens = layer, tokens
        (self.w13, self.s13), (self.w2, self.s2) = weights
        self.pairs = tokens * layer.top_k
        topk_ids = routed(layer, tokens, routing)
        self.sorted = {block: sorted_pairs(topk_ids, layer.experts, block) for block in (64, 128)}
        self.a, self.a_scale = quantized(torch.randn(tokens, layer.hidden, device="cuda").bfloat16(), layer.scheme)
        self.inner = {}
        for block, rows in self.sorted.items():
            inner = torch.randn(len(rows.ids), layer.inner, device="cuda").bfloat16()
            self.inner[block] = quantized(inner, layer.scheme)

    def rows_of(self, block: int) -> Tensor:
        """Real rows of sampled blocks."""
        rows = self.sorted[block]
        picked = torch.linspace(0, len(rows.experts) - 1, SAMPLED_BLOCKS, device="cuda").long().unique()  # type: ignore[no-untyped-call]
        at: Tensor = (picked[:, None] * block + torch.arange(block, device="cuda")).flatten()
        is_real: Tensor = rows.ids[at] < self.pairs
        return at[is_real]

    def wanted(self, stage: str, block: int, at: Tensor) -> Tensor:
        """float32 results of these rows."""
        rows = self.sorted[block]
        owners = rows.experts[at // block]
        out = []
        for expert in dict.fromkeys(owners.tolist()):
            mine = at[owners == expert]
            if stage == "up":
                tokens = (rows.ids[mine] // self.layer.top_k).long()
                scale = None if self.a_scale is None else self.a_scale[tokens]
                x = real(
                    self.a.view(torch.uint8)[tokens].view(self.a.dtype) if scale is not None else self.a[tokens], scale
                )
                y = x @ real(self.w13[expert], None if self.s13 is None else self.s13[expert]).T
                out.append(silu(y[:, : self.layer.inner]) * y[:, self.layer.inner :])
            else:
                values, scale = self.inner[block]
                picked = values[mine] if scale is None else values.view(torch.uint8)[mine].view(values.dtype)
                x = real(picked, None if scale is None else scale[mine])
                out.append(x @ real(self.w2[expert], None if self.s2 is None else self.s2[expert]).T)
        return torch.cat(out)

    def output(self, block: int, columns: int, *, is_quantized: bool = False) -> tuple[Tensor, Tensor | None]:
        rows = len(self.sorted[block].ids)
        if not is_quantized:
            return torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16), None
        scale = torch.empty(columns // 128, rows, device="cuda").T
        return torch.empty(rows, columns, device="cuda", dtype=torch.float8_e4m3fn), scale


def checked(stage: str, name: str, launch: Callable[[], object], out: Tensor, scale: Tensor | None) -> Candidate:
    """A candidate that writes `out`, with `scale` where it quantizes."""

    def poison() -> None:
        out.view(torch.uint8).fill_(0x7F) if scale is not None else out.fill_(float("nan"))
        if scale is not None:
            scale.fill_(float("nan"))

    def values(at: Tensor) -> Tensor:
        picked = out[at] if scale is None else out.view(torch.uint8)[at].view(out.dtype)
        return real(picked, None if scale is None else scale[at])

    return Candidate(stage, name, launch, values, poison)


def warp_specialized(race: Race) -> list[Candidate]:
    """Ours in Gluon."""
    from sglang_moe_ext.kernel_plans import WarpSpecializedDown, WarpSpecializedUp
    from sglang_moe_ext.kernels.warp_specialized_down import launch_down
    from sglang_moe_ext.kernels.warp_specialized_up import launch_up

    layer, rows = race.layer, race.sorted[128]
    made = []
    for up in [WarpSpecializedUp(2), WarpSpecializedUp(8), WarpSpecializedUp(1, persistent=False)]:
        out, scale = race.output(128, layer.inner, is_quantized=layer.scheme == "block")

        def launch(out: Tensor = out, scale: Tensor | None = scale, config: Any = up) -> None:
            launch_up(
                race.a, race.w13, out, rows.ids, rows.experts, rows.padded, config, pairs=race.pairs, top_k=layer.top_k,
                a_scale=race.a_scale, weight_scale=race.s13, out_scale=scale,
            )  # fmt: skip

        made.append(checked("up", str(up), launch, out, scale))
    downs = [WarpSpecializedDown("wide", g) for g in (4, 8)]
    if layer.scheme == "block":
        downs += [WarpSpecializedDown("pair", g, 3) for g in (4, 8)]
    inner, inner_scale = race.inner[128]
    if layer.scheme == "block" and inner_scale is not None:
        inner_scale = inner_scale.T.contiguous().T
    out, _ = race.output(128, layer.hidden)
    for down in downs:

        def launch_second(config: Any = down) -> None:
            launch_down(
                inner, race.w2, out, rows.experts, rows.padded, config, sorted_token_ids=rows.ids, pairs=race.pairs,
                a_scale=inner_scale, weight_scale=race.s2,
            )  # fmt: skip

        made.append(checked("down", str(down), launch_second, out, None))
    return made


def triton(race: Race) -> list[Candidate]:
    """Ours in Triton, the tiles that won most often."""
    from sglang_moe_ext.core import Quantization
    from sglang_moe_ext.kernel_plans import DownConfig, UpConfig
    from sglang_moe_ext.kernels.quantize import Scales
    from sglang_moe_ext.kernels.sorted_down import launch_down
    from sglang_moe_ext.kernels.sorted_up import launch_up

    layer = race.layer
    scheme = {
        "none": Quantization(),
        "block": Quantization("fp8_w8a8", (128, 128)),
        "channel": Quantization("fp8_w8a8", per_channel=True),
    }[layer.scheme]
    ups = {
        "none": [UpConfig(128, 128, 64, 8, 8, 4), UpConfig(64, 128, 64, 32, 8, 4)],
        "block": [UpConfig(64, 128, 128, 32, 8, 3), UpConfig(64, 128, 128, 32, 8, 2, persistent=False)],
        "channel": [],
    }[layer.scheme]
    downs = {
        "none": [
            DownConfig(128, 256, 64, 8, 8, 4, half_stores=True),
            DownConfig(64, 128, 64, 8, 4, 4, programs_per_sm=2),
        ],
        "block": [
            DownConfig(64, 128, 128, 8, 4, 4, programs_per_sm=2),
            DownConfig(64, 128, 128, 8, 4, 3, persistent=False),
        ],
        "channel": [DownConfig(128, 256, 128, 8, 8, 4, half_stores=True)],
    }[layer.scheme]
    made = []
    for up in ups:
        rows = race.sorted[up.block_m]
        is_block = layer.scheme == "block"
        out, _ = race.output(up.block_m, layer.inner, is_quantized=is_block)
        out_scale = torch.empty(out.shape[0], layer.inner // 128, device="cuda") if is_block else None

        def launch(out: Tensor = out, scale: Tensor | None = out_scale, config: Any = up, rows: Sorted = rows) -> None:
            launch_up(
                race.a, race.w13, out, rows.ids, rows.experts, rows.padded, config, pairs=race.pairs, top_k=layer.top_k,
                align_block_m=config.block_m, out_scale=scale,
                scales=None if race.s13 is None else Scales(scheme, race.a_scale, race.s13),
            )  # fmt: skip

        made.append(Candidate("up", f"Triton {up}", launch))
    for down in downs:
        rows = race.sorted[down.block_m]
        inner, inner_scale = race.inner[down.block_m]
        out, _ = race.output(down.block_m, layer.hidden)

        def launch_second(
            out: Tensor = out, config: Any = down, rows: Sorted = rows, inner: Tensor = inner,
            inner_scale: Tensor | None = inner_scale,
        ) -> None:  # fmt: skip
            launch_down(
                inner, race.w2, out, rows.experts, rows.padded, config, align_block_m=config.block_m,
                scales=None if race.s2 is None else Scales(scheme, inner_scale, race.s2),
            )  # fmt: skip

        made.append(Candidate("down", f"Triton {down}", launch_second))
    return made


def deep_gemm(race: Race) -> list[Candidate]:
    """The grouped GEMM alone; none where it does not import."""
    layer, rows = race.layer, race.sorted[128]
    if layer.scheme == "channel":
        return []
    try:
        import deep_gemm as library
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        print(f"DeepGEMM is left out: {type(error).__name__}: {error}", file=sys.stderr)
        return []
    owners = rows.experts.repeat_interleave(128)
    tokens = (rows.ids.clamp(max=race.pairs - 1) // layer.top_k).long()
    gathered = race.a.view(torch.uint8)[tokens].view(race.a.dtype) if race.a_scale is not None else race.a[tokens]
    made = []
    for stage, a, a_scale, w, w_scale in (
        ("up", gathered, None if race.a_scale is None else race.a_scale[tokens], race.w13, race.s13),
        ("down", *race.inner[128], race.w2, race.s2),
    ):
        out = torch.empty(a.shape[0], w.shape[1], device="cuda", dtype=torch.bfloat16)
        transposed = None if a_scale is None else a_scale.T.contiguous().T

        def launch(a: Any = a, sa: Any = transposed, w: Any = w, sw: Any = w_scale, out: Tensor = out) -> None:
            if sa is None:
                library.m_grouped_bf16_gemm_nt_contiguous(a, w, out, owners)
            else:
                library.m_grouped_fp8_gemm_nt_contiguous((a, sa), (w, sw), out, owners, disable_ue8m0_cast=True)

        made.append(Candidate(stage, "DeepGEMM, product alone", launch))
    return made


def race_layer(layer: Layer, tokens: int, routing: str, rounds: int, weights: Any, select: str) -> list[dict[str, Any]]:
    """Each candidate's median us, TFLOP/s and error."""
    race = Race(layer, tokens, routing, weights)
    candidates = [c for make in (warp_specialized, triton, deep_gemm) for c in make(race) if select in c.name]
    errors: dict[int, float | str] = {}
    running: list[Candidate] = []
    for candidate in candidates:
        try:
            if candidate.poison is not None and candidate.values is not None:
                candidate.poison()
                candidate.launch()
                at = race.rows_of(128)
                got, wanted = candidate.values(at), race.wanted(candidate.stage, 128, at)
                everything = candidate.values((race.sorted[128].ids < race.pairs).nonzero().flatten()[::7])
                finite = bool(everything.isfinite().all())
                errors[len(running)] = (
                    float((got - wanted).abs().max() / wanted.abs().max()) if finite else float("nan")
                )
            else:
                candidate.launch()
            torch.cuda.synchronize()
            running.append(candidate)
        except Exception as error:  # noqa: BLE001, PERF203 - costs this candidate alone
            print(f"left out: {candidate.name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
    flushed = torch.empty(FLUSHED_BYTES // 4, device="cuda", dtype=torch.int32)
    samples: list[list[float]] = [[] for _ in running]
    for round_ in range(rounds + 1):
        torch.cuda._sleep(3_000_000)  # type: ignore[no-untyped-call] # the queue fills meanwhile: no launch is waited for
        events = []
        for candidate in running:
            flushed.fill_(round_)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            candidate.launch()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        if round_:
            for us, (begin, end) in zip(samples, events, strict=True):
                us.append(begin.elapsed_time(end) * 1e3)
    flop = 2 * race.pairs * layer.hidden * layer.inner
    padding = len(race.sorted[128].ids) / race.pairs - 1
    return [
        {
            "m": tokens, "routing": routing, "stage": c.stage, "kernel": c.name, "us": round(median(us), 1),
            "tflops": round(flop * (2 if c.stage == "up" else 1) / median(us) / 1e6), "error": errors.get(i),
            "padding": round(padding, 3),
        }
        for i, (c, us) in enumerate(zip(running, samples, strict=True))
    ]  # fmt: skip


def child(asked: dict[str, Any]) -> None:
    """Race one layer in this process; one JSON line per result."""
    torch.manual_seed(int(asked.get("seed", 0)))
    layer = replace(LAYERS[asked["layer"]], **asked.get("changes", {}))
    weights = random_weights(layer, 2 * layer.inner, layer.hidden), random_weights(layer, layer.hidden, layer.inner)
    for routing in asked["routing"]:
        for tokens in asked["tokens"]:
            for row in race_layer(layer, tokens, routing, asked["rounds"], weights, asked["select"]):
                print(json.dumps(row), flush=True)


def spawned(asked: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.warp_specialized", "--child", json.dumps(asked)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], timeout_s: float) -> tuple[list[dict[str, Any]], str]:
    """Its rows, and how it ended."""
    try:
        out, _ = process.communicate(timeout=timeout_s)
        how = "ok" if process.returncode == 0 else f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        how = f"no answer in {timeout_s:.0f} s: a hang, or too much to do"
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], how


def check(layers: Sequence[str]) -> bool:
    """Every kernel form once, in small, each in a process of its own, all at once."""
    small = {"experts": 8, "top_k": 2}
    asked = [
        {"layer": name, "changes": small, "routing": ["uniform"], "tokens": [300], "rounds": 1, "select": word}
        for name in layers
        for word in ("128x(2x128) G8 s4", "128x256 G8 s4", "2 CTAs of 128x128 G8")
        if word in ("128x(2x128) G8 s4", "128x256 G8 s4") or LAYERS[name].scheme == "block"
    ]  # fmt: skip
    processes = [spawned(one) for one in asked]
    good = True
    until = time.monotonic() + CHECK_TIMEOUT_S
    for one, process in zip(asked, processes, strict=True):
        rows, how = ended(process, max(1.0, until - time.monotonic()))
        worst = max((row["error"] for row in rows), default=float("nan"))
        is_right = bool(rows) and all(row["error"] < 0.06 for row in rows)
        good = good and is_right
        print(
            f"{one['layer']:28s} {one['select']:28s} {how}, error {worst:.1e} {'ok' if is_right else 'WRONG'}",
            flush=True,
        )
    return good


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a check failed, 2 usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), metavar="NAME")
    parser.add_argument("--batch-size", nargs="+", type=int, default=list(TOKENS), metavar="M")
    parser.add_argument("--routing", nargs="+", choices=("uniform", "zipf"), default=["uniform"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--select", default="", help="only kernels whose name has this in it")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        child(json.loads(arguments.child))
        return 0
    import triton as triton_package

    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, Triton {triton_package.__version__}, {time.strftime('%Y-%m-%d')}")
    if arguments.check:
        return 0 if check(arguments.layers) else 1
    document = {}
    for layer in arguments.layers:
        asked = {
            "layer": layer, "routing": arguments.routing, "tokens": arguments.batch_size, "rounds": arguments.rounds,
            "select": arguments.select,
        }  # fmt: skip
        rows, how = ended(spawned(asked), TIMEOUT_S)
        print(f"\n## {layer} ({how})", flush=True)
        document[layer] = rows
        for stage in ("up", "down"):
            names = list(dict.fromkeys(row["kernel"] for row in rows if row["stage"] == stage))
            for kernel in names:
                mine = [row for row in rows if row["stage"] == stage and row["kernel"] == kernel]
                worst = max((row["error"] for row in mine if row["error"] is not None), default=None)
                cells = " ".join(f"{row['m']}{row['routing'][0]}:{row['us']:.0f}/{row['tflops']}" for row in mine)
                print(f"{stage:4s} {kernel[:58]:58s} {cells}{'' if worst is None else f' err {worst:.1e}'}", flush=True)
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
