"""What `sglang-moe-ext doctor` says of vLLM: the configuration that both GEMMs of a layer take at each M, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_moe_ext import terminal
from sglang_moe_ext.engines.lookups import Answer
from sglang_moe_ext.engines.vllm import lookup, naming
from sglang_moe_ext.engines.vllm.lookup import Question
from sglang_moe_ext.patients import Patient
from sglang_moe_ext.store import provenance, tables


def examine(patient: Patient, tokens: Sequence[int], deterministic: bool) -> Mapping[str, Any]:
    """Ask the vLLM of this environment, and print what it says.

    Raises:
        EngineError: it could not be asked.
    """
    pretend = None if patient.is_here else patient.gpu
    answer = lookup.ask(Question(patient.shape, tokens, pretend, deterministic), who=lookup.AS_SERVED)
    print(f"{patient.name}: {patient.shape}")
    print(f"{patient.gpu.device_name} ({patient.where}), vLLM {answer.engine_version}, Triton {answer.triton}")
    print(f"sglang-moe-ext in a server of this environment: {answer.plugin}")
    print("whether the experts that vLLM chooses there read tables at all, our line in the server's log says")
    for file in answer.files:
        print(f"reads {file}")
    whys = {m: answer.whys.get(m) or _why(patient, answer, m, deterministic) for m in answer.up}
    rows = [[str(m), str(config), whys[m]] for m, config in answer.up.items()]
    columns = ["M", "configuration", "why"]
    terminal.show(terminal.Grid("what vLLM takes for both GEMMs", columns, rows, frozenset(columns[1:])))
    return {
        "engine": "vLLM",
        "model": patient.name,
        "gpu": patient.gpu.device_name,
        "plugin": answer.plugin,
        "files": [str(file) for file in answer.files],
        "findings": [{"M": m, "config": str(config), "why": whys[m]} for m, config in answer.up.items()],
    }


def _why(patient: Patient, answer: Answer, tokens: int, deterministic: bool) -> str:
    """Why the engine takes what is its own choice."""
    if deterministic:
        return "the engine's default: batch invariance reads no table"
    name = naming.file_name(naming.table_key(patient.shape, patient.gpu.device_name))
    file = next((file for file in answer.files if file.name == name and _is_engines(file, answer)), None)
    if file is None:
        return f"the engine's default: no table {name}"
    nearest = tables.nearest(tables.read(file), tokens)
    entry = "its own entry" if nearest == tokens else f"nearest entry {nearest}"
    known = provenance.read(file)
    return f"{entry}; {(known and known.origin(nearest)) or 'origin unknown: shipped with the engine, or yours'}"


def _is_engines(file: Path, answer: Answer) -> bool:
    """Whether the engine's own lookup opened it, which says so in its log."""
    return any(str(file) in line for line in answer.log)
