"""Which tables there are for this environment: in the user's store, in this package, in the engines' own folders."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext import package_data
from sglang_moe_ext.core import Gpu, GpuError, ModelError, MoEShape, Table, TableError, TableKey
from sglang_moe_ext.engines import installed_engines, table_names
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.engines.sglang import installation as sglang
from sglang_moe_ext.engines.sglang import table_names as sglang_table_names
from sglang_moe_ext.engines.vllm import installation as vllm
from sglang_moe_ext.engines.vllm import table_names as vllm_table_names
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.models import parse_shape
from sglang_moe_ext.serving import sglang_hooks, table_search, table_selection, vllm_hooks
from sglang_moe_ext.serving.table_search import TableDir
from sglang_moe_ext.serving.table_selection import OurEntry
from sglang_moe_ext.stock.importing import IMPORTED
from sglang_moe_ext.tables import config_table, provenance, user_store
from sglang_moe_ext.tables.provenance import Provenance, ProvenanceEntry

_LEFT_TO_THE_ENGINE = "the engine's own table"


@dataclass(frozen=True, slots=True)
class BrokenTable:
    """A file that is named as a table and is none."""

    engine: EngineName
    path: Path
    why: str


@dataclass(frozen=True, slots=True)
class ListedTable:
    """One up table. `shape` is None where its provenance does not state the layer.

    `origins`: how many of its entries are of each origin. `gain`: geometric mean of what its entries were measured to
    gain over what ran before, None where none was. `served`: at how many of its entries a server of this environment
    in which the plugin is active takes this table, or a copy of it; None where that cannot be told. `shadowed_by`: what
    it takes at the others, `the engine's own table` where the lookup is left to the engine.
    """

    engine: EngineName
    path: Path
    key: TableKey
    where: str
    triton: str | None
    model: str | None
    shape: MoEShape | None
    origins: dict[str, int]
    gain: float | None
    served: int | None
    shadowed_by: tuple[str, ...]

    @property
    def entries(self) -> int:
        return sum(self.origins.values())


def table_dirs(engine: EngineName) -> list[TableDir]:
    """Where a server of this environment finds tables: as the plugin has them, without the engine where there is none.

    Raises:
        EngineError: the installed engine is older than any that is known.
    """
    if engine == "sglang" and (here := sglang.find()) is not None:
        return sglang_hooks.table_dirs(here)
    if engine == "vllm" and (other := vllm.find()) is not None:
        return vllm_hooks.table_dirs(other)
    tuned, own = package_data.folder("tuned_configs"), user_store.root_if_any()
    naming = vllm_table_names.NAMING if engine == "vllm" else sglang_table_names.NAMING
    shipped = None if tuned is None else tuned / ("vllm" if engine == "vllm" else "configs")
    return [
        *([] if own is None else [TableDir("your", own / "tables" / engine, dialect=naming)]),
        *([] if shipped is None else [TableDir("the shipped", shipped, dialect=naming)]),
    ]


def list_tables(engine: EngineName, *, with_engines_own: bool = False) -> Iterator[ListedTable | BrokenTable]:
    """Every table for that engine. `with_engines_own`: those that the engine ships, too, of which there are hundreds.

    Raises:
        EngineError: the installed engine is older than any that is known.
    """
    dirs, triton = table_dirs(engine), installed_engines.running_triton()
    for table_dir in dirs:
        for path in _up_tables(table_dir):
            known = provenance.read(path)
            if table_dir.is_engines and not table_dir.is_asked_for and known is None and not with_engines_own:
                continue
            try:
                yield _listed(engine, table_dir, path, known, dirs, triton)
            except TableError as error:
                yield BrokenTable(engine, path, str(error))


def _up_tables(table_dir: TableDir) -> list[Path]:
    folders = [table_dir.root] if table_dir.is_flat else sorted(table_dir.root.glob("triton_*"))
    return [path for folder in folders for path in sorted(folder.glob("*.json")) if config_table.is_up_table(path.name)]


def _listed(
    engine: EngineName,
    table_dir: TableDir,
    path: Path,
    known: Provenance | None,
    dirs: Sequence[TableDir],
    triton: str | None,
) -> ListedTable:
    key, table = table_names.parse(path.name), config_table.read(path)
    entries = {} if known is None else known.entries
    run = next((entry.run for entry in entries.values()), None)
    shape = None if run is None else _shape(run.shape)
    taken = None if shape is None or triton is None else _taken(key, shape, table, triton, dirs)
    others = {} if taken is None else {m: taker for m, taker in taken.items() if not _is_same(taker, path, table)}
    in_folder = path.parent.name.removeprefix("triton_").replace("_", ".")
    return ListedTable(
        engine=engine,
        path=path,
        key=key,
        where=table_dir.name,
        triton=in_folder if path.parent.name.startswith("triton_") else None if run is None else run.triton,
        model=None if run is None else run.model,
        shape=shape,
        origins=_origins(table, entries),
        gain=_gain(entries),
        served=None if taken is None else len(taken) - len(others),
        shadowed_by=tuple(dict.fromkeys(others.values())),
    )


def _is_same(taker: str, path: Path, table: Table) -> bool:
    """Whether a server takes this very table, or a copy of it that comes first."""
    if taker == str(path):
        return True
    return taker != _LEFT_TO_THE_ENGINE and config_table.read(Path(taker)) == table


def _shape(text: str) -> MoEShape | None:
    try:
        return parse_shape(text)
    except ModelError:
        return None


def _origins(table: Table, entries: dict[int, ProvenanceEntry]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for m in table:
        entry = entries.get(m)
        origin = "unknown" if entry is None else "imported" if IMPORTED in entry.figures else entry.origin
        counts[origin] = counts.get(origin, 0) + 1
    return counts


def _gain(entries: dict[int, ProvenanceEntry]) -> float | None:
    gains = [entry.figures["gain"] for entry in entries.values() if entry.figures.get("gain", 0) > 0]
    return math.exp(sum(map(math.log, gains)) / len(gains)) if gains else None


def _gpu(key: TableKey) -> Gpu | None:
    try:
        return find_gpu(key.device_name)
    except GpuError:
        return None


def _taken(
    key: TableKey, shape: MoEShape, table: Table, triton: str, dirs: Sequence[TableDir]
) -> dict[int, str] | None:
    """What a server on that table's GPU takes at each M of the table, by the plugin's own rule."""
    gpu = _gpu(key)
    if gpu is None:
        return None
    found = table_search.search(shape, gpu.device_name, gpu, triton, dirs)
    chosen = {m: table_selection.select(found, m) for m in table}
    return {m: str(one.path) if isinstance(one, OurEntry) else _LEFT_TO_THE_ENGINE for m, one in chosen.items()}


def engines() -> list[EngineName]:
    """The engines that are installed here, or all where none is."""
    here = [name for name, adapter in ENGINES.items() if adapter.find() is not None]
    return here or list(ENGINES)
