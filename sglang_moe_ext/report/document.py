"""A report for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sglang_moe_ext.report.run_data import ReportedRun, TokensRow, kernels_gains, mean_gain, tuned_gains

FORMAT = 1


def document(run: ReportedRun) -> Mapping[str, Any]:
    """All values of one run; null is what its source does not record."""
    space = run.space
    return {
        "kind": run.kind,
        "source": run.source,
        "name": run.name,
        "engine": run.engine,
        "triton": run.triton,
        "shape": None if run.shape is None else str(run.shape),
        "gpu": run.device_name,
        "environment": dict(run.environment),
        "commands": list(run.commands),
        "files": list(run.files),
        "tolerated_error": run.tolerated_error,
        "mean_gain": _rounded(mean_gain(list(tuned_gains(run).values()))),
        "mean_kernels_gain": _rounded(mean_gain(list(kernels_gains(run).values()))),
        "entries": [_entry(row) for row in run.rows],
        "space": None
        if space is None
        else {
            "configurations": space.configurations,
            "kept": space.kept,
            "dropped": dict(space.dropped),
            "binaries": len(space.cells),
            "timed_binaries": space.timed,
            "timed_with_tma": space.with_tma,
        },
        "regret": [
            {"m": row.m, "timed": len(row.curve), "first": _rounded(row.after(1)), "of_8": _rounded(row.after(8))}
            for row in run.regret
        ],
        "notes": list(run.notes),
    }


def _entry(row: TokensRow) -> Mapping[str, Any]:
    return {
        name: {key: _rounded(one) for key, one in value.items()} if isinstance(value, dict) else _rounded(value)
        for name, value in asdict(row).items()
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
