"""Take tables that were made elsewhere into the user's own store, with what is known of where they come from."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sglang_moe_ext import __version__
from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.stock.given_table import GivenTable
from sglang_moe_ext.tables import merge
from sglang_moe_ext.tables.merge import RefusedTable, StoredTable
from sglang_moe_ext.tables.provenance import Provenance, ProvenanceEntry, TuningRun
from sglang_moe_ext.tuning import install_target

ImportedOrigin = Literal["measured", "transferred"]
MEASURED: ImportedOrigin = "measured"
TRANSFERRED: ImportedOrigin = "transferred"
IMPORTED = "imported"
"""The figure that marks an entry as imported: releases before this one read it as any other figure."""


@dataclass(frozen=True, slots=True)
class ImportedTable:
    """Where one table went, or why it did not."""

    source: Path
    place: Path
    refused: str | None


def provenance_of(given: GivenTable, shape: MoEShape, triton: str, command: str, origin: ImportedOrigin) -> Provenance:
    """What is known of each entry: what the file beside the table says, else that it was imported.

    `origin` of an entry without provenance: `measured` where the user vouches for it. `transferred`, the default of the
    command, is worth more than a prediction and less than what was measured here.
    """
    run = TuningRun(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        model=str(shape),
        shape=str(shape),
        gpu=given.gpu.device_name,
        kernel=f"imported from {given.path.name}",
        engine=None,
        triton=triton,
        torch=None,
        driver=None,
        seed=0,
        sglang_moe_ext=__version__,
    )
    known: Mapping[int, ProvenanceEntry] = {} if given.known is None else given.known.entries
    mark = {IMPORTED: 1.0}
    entries = {
        m: ProvenanceEntry(origin, run, mark) if m not in known else replace(known[m], figures=known[m].figures | mark)
        for m in given.table
    }
    return Provenance(entries)


def import_table(
    given: GivenTable,
    shape: MoEShape,
    engine: EngineName,
    triton: str,
    command: str,
    origin: ImportedOrigin,
) -> ImportedTable:
    """Merge the table into the user's own store, under the name that the engine asks for.

    Raises:
        MoEExtError: the store cannot be written, or what lies there is no table.
    """
    adapter = ENGINES[engine]
    place = install_target.store_folder(engine, triton) / adapter.file_name(given.key)
    stored = StoredTable(given.table, provenance_of(given, shape, triton, command, origin))
    result = merge.put({place: stored}, (), lambda table: adapter.table_text(table, triton))[place]
    return ImportedTable(given.path, place, result.why if isinstance(result, RefusedTable) else None)
