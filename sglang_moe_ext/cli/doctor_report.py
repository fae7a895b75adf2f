"""Render an examination: for people, and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sglang_moe_ext.cli import console
from sglang_moe_ext.cli.doctor_examination import Examination, Finding

_COLUMNS = ("M", "GEMM", "configuration", "why")


def show(found: Examination) -> None:
    """Print it for people."""
    layer = found.layer
    where = "here" if layer.is_here else "not here: the engine was told that it runs on it"
    print(f"{layer.name}: {layer.shape}")
    print(f"{layer.gpu.device_name} ({where}), {found.engine} {found.engine_version}, Triton {found.triton}")
    if found.no_table:
        print(f"NO TABLE IS READ{'' if found.backend else ' as far as is known'}, whatever follows: {found.no_table}")
    elif found.backend:
        print(f"runs {found.backend.name}, which reads tables (asked {found.engine}: {found.backend.method})")
    print(f"sglang-moe-ext in a server of this environment: {found.plugin}")
    for problem in found.problems:
        print(f"problem: {problem}")
    for file in found.files:
        print(f"reads {file}")
    rows = [[str(one.tokens), one.gemm, one.config, one.why] for one in found.findings]
    console.show(console.Grid(f"what {found.engine} takes", _COLUMNS, rows, frozenset(_COLUMNS[1:])))


def document(found: Examination) -> Mapping[str, Any]:
    """The same for programs."""
    return {
        "engine": found.engine,
        "model": found.layer.name,
        "gpu": found.layer.gpu.device_name,
        "reads_tables": found.reads_tables,
        "no_table": found.no_table,
        "backend": None if found.backend is None else asdict(found.backend),
        "plugin": found.plugin,
        "files": [str(file) for file in found.files],
        "problems": list(found.problems),
        "findings": [_entry(one) for one in found.findings],
    }


def _entry(finding: Finding) -> Mapping[str, Any]:
    return {"M": finding.tokens, "gemm": finding.gemm, "config": finding.config, "why": finding.why}
