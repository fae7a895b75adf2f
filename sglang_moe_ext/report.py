"""Turn plans, results and findings into tables for people and one JSON document for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_moe_ext.core import CompileKey, Origin
from sglang_moe_ext.engines.sglang import naming
from sglang_moe_ext.engines.vllm import naming as vllm_naming
from sglang_moe_ext.roofline import pair_floor_us
from sglang_moe_ext.terminal import Grid
from sglang_moe_ext.tuning.measured import Measured
from sglang_moe_ext.tuning.pipeline import Outcome
from sglang_moe_ext.tuning.plan import Plan
from sglang_moe_ext.tuning.predict import Predicted
from sglang_moe_ext.tuning.request import Request
from sglang_moe_ext.tuning.space import RULES


def names_of(request: Request) -> dict[str, str]:
    """The names of the layer's tables in each engine's dialect; of a bare shape, vLLM's is for the same tensors."""
    device = request.gpu.device_name
    vllm_shape = request.vllm_shape or request.shape
    return {
        "SGLang": naming.file_name(naming.table_key(request.shape, device)),
        "SGLang, down projection": naming.file_name(naming.table_key(request.shape, device, down=True)),
        "vLLM": vllm_naming.file_name(vllm_naming.table_key(vllm_shape, device)),
    }


def candidates(plan: Plan) -> Grid:
    """What each rule dropped, and what is left."""
    whys = {rule.name: rule.why for rule in RULES}
    keys: set[CompileKey] = {config.compile_key for config in plan.sifted.kept}
    rows = [[f"dropped: {name}", str(count), whys[name]] for name, count in plan.sifted.dropped.items()]
    rows.append(["kept", str(len(plan.sifted.kept)), f"{len(keys)} binaries a GEMM, apart from GROUP_SIZE_M"])
    return Grid("candidates", ["rule", "count", "why"], rows, frozenset({"rule", "why"}))


def forecast(plan: Plan) -> Grid:
    """The floor, and the predicted times of today's choice and of the best candidate, by M."""
    rows = [
        [
            str(row.tokens),
            f"{row.floor_us:.1f}",
            "-" if row.incumbent_us is None else f"{row.incumbent_us:.1f}",
            f"{row.best_us:.1f}",
            "-" if row.incumbent_us is None else f"{row.incumbent_us / row.best_us:.2f}x",
            str(row.best),
        ]
        for row in plan.rows
    ]
    columns = ["M", "floor us", "today us", "best us", "gain", "best candidate"]
    title = "forecast of the up and down GEMM together (all predicted)"
    return Grid(title, columns, rows, frozenset({"best candidate"}))


def results(request: Request, outcome: Outcome) -> Grid:
    """What was chosen for each M."""
    rows: list[list[str]] = []
    columns: list[str] = []
    for m, result in outcome.results.items():
        floor = pair_floor_us(request.shape, request.gpu, m)
        match result:
            case Predicted():
                columns = ["M", "configuration", "predicted us", "floor us", "shared memory", "registers"]
                needs = result.resources.values()
                smem, registers = max(need.smem_bytes for need in needs), max(need.registers for need in needs)
                rows.append(
                    [str(m), str(result.config), f"{result.us:.1f}", f"{floor:.1f}", f"{smem} B", str(registers)]
                )
            case Measured():
                columns = ["M", "up", "down", "before us", "after us", "gain", "noise", "of floor", "error"]
                rows.append(
                    [
                        str(m),
                        str(result.pair["up"]),
                        str(result.pair["down"]),
                        f"{result.incumbent_us:.1f}",
                        f"{result.us:.1f}",
                        f"{result.gain:.3f}x",
                        f"{result.noise:.1%}",
                        f"{floor / result.us:.0%}",
                        f"{result.error:.1e}",
                    ]
                )
    title = f"{origin(outcome).upper()} for {request.gpu.device_name}, with {outcome.kernel.name}"
    return Grid(title, columns, rows, frozenset({"configuration", "up", "down"}))


def origin(outcome: Outcome) -> Origin:
    """Whether the results were measured or predicted."""
    return "measured" if any(isinstance(result, Measured) for result in outcome.results.values()) else "predicted"


def document(request: Request, outcome: Outcome) -> Mapping[str, Any]:
    """The outcome for programs."""
    return {
        "origin": origin(outcome),
        "model": request.model,
        "gpu": request.gpu.device_name,
        "kernel": outcome.kernel.name,
        "written": [str(path) for path in outcome.written],
        "refused": {str(path): why for path, why in outcome.refused.items()},
        "environment": {} if outcome.destination is None else outcome.destination.environment,
        "picked_up": None if outcome.answer is None else True,
        "entries": len(outcome.results),
    }


def plan_document(request: Request, plan: Plan) -> Mapping[str, Any]:
    """The plan for programs."""
    return {
        "dry_run": True,
        "model": request.model,
        "gpu": request.gpu.device_name,
        "names": names_of(request),
        "kept": len(plan.sifted.kept),
        "dropped": plan.sifted.dropped,
        "binaries": plan.binaries,
        "estimated_s": round(plan.estimated_s),
    }
