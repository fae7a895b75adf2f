"""Where a table came from: `<table>.provenance.json` beside it, with the run and the figures of each entry."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from sglang_moe_ext.core import Origin, TableError
from sglang_moe_ext.tables import files
from sglang_moe_ext.untrusted import show

FORMAT = 1


@dataclass(frozen=True, slots=True)
class TuningRun:
    """The circumstances under which entries were made; None where a machine has no such thing."""

    date: str
    command: str
    model: str
    shape: str
    gpu: str
    kernel: str
    engine: str | None
    triton: str | None
    torch: str | None
    driver: str | None
    seed: int
    sglang_moe_ext: str


@dataclass(frozen=True, slots=True)
class ProvenanceEntry:
    """How one M's configuration came to be.

    Times in microseconds: measured ones of the whole layer, predicted ones of the up and down GEMM together.
    """

    origin: Origin
    run: TuningRun
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Provenance:
    """What is known of each entry of a table, by M.

    `broken`: why the file cannot be read; then nothing is known, and the table is worth no more than a predicted one.
    """

    entries: dict[int, ProvenanceEntry]
    broken: str | None = None

    def origin(self, tokens: int) -> Origin | None:
        """How that entry came to be; None if the file does not say so."""
        entry = self.entries.get(tokens)
        return None if entry is None else entry.origin


def sidecar(table: Path) -> Path:
    """The provenance file of a table."""
    return table.with_name(f"{table.stem}.provenance.json")


def to_json(provenance: Provenance) -> str:
    runs: list[TuningRun] = list(dict.fromkeys(entry.run for entry in provenance.entries.values()))
    document = {
        "format": FORMAT,
        "runs": [asdict(run) for run in runs],
        "entries": {
            str(m): {"origin": entry.origin, "run": runs.index(entry.run), "figures": entry.figures}
            for m, entry in sorted(provenance.entries.items())
        },
    }
    return json.dumps(document, indent=1) + "\n"


def read(table: Path) -> Provenance | None:
    """The provenance of a table: None if there is no such file, a `broken` one if it cannot be read."""
    path = sidecar(table)
    if not os.path.lexists(path):
        return None
    try:
        document = files.read_json(path)
    except TableError as error:
        return Provenance({}, broken=str(error))
    try:
        return parse(document)
    except TableError as error:
        return Provenance({}, broken=f"{show(str(path))}: {error}")


def parse(document: Any) -> Provenance:
    """Raises TableError where the document is no provenance of this format."""
    try:
        if document["format"] != FORMAT:
            raise TableError(f"provenance format {show(document['format'])}: expected {FORMAT}")
        runs = [parse_run(run) for run in document["runs"]]
        entries = {
            int(m): ProvenanceEntry(_origin(entry["origin"]), runs[entry["run"]], _figures(entry["figures"]))
            for m, entry in document["entries"].items()
        }
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TableError(f"no provenance of ours: {type(error).__name__} {show(error)}") from error
    return Provenance(entries)


def parse_run(document: dict[str, Any]) -> TuningRun:
    """Raises TableError or KeyError where the document is none."""
    values = {item.name: document[item.name] for item in fields(TuningRun)}
    for name, value in values.items():
        if not isinstance(value, str | int | None):
            raise TableError(f"run with {name}={show(value)}: expected text or a whole number")
    return TuningRun(**values)


def _figures(document: dict[str, Any]) -> dict[str, float]:
    return {name: float(figure) for name, figure in document.items()}


def _origin(text: str) -> Origin:
    for origin in get_args(Origin):
        if text == origin:
            return origin  # type: ignore[no-any-return]
    raise TableError(f"origin {show(text)}: expected one of {', '.join(get_args(Origin))}")
