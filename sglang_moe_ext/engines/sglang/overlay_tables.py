"""Choose the tables of an overlay, and make them safe for an engine that runs without our hooks."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_moe_ext.core import MoEExtError, Quantization, TableKey
from sglang_moe_ext.engines import table_names
from sglang_moe_ext.engines.sglang import support
from sglang_moe_ext.engines.sglang import table_names as sglang_table_names
from sglang_moe_ext.tables import config_table, merge, provenance
from sglang_moe_ext.tables.merge import RefusedTable, StoredTable

log = logging.getLogger(__name__)


Version = tuple[int, int, int]


Outcome = dict[Path, str | None]


"""By file: why our table was not put there, or None where it was."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Folders with a folder of tables for each Triton: ours, the nearest to the user first, and the engine's own."""

    ours: Sequence[Path]
    engines: Path

    def tables(self, name: str) -> Iterator[tuple[int, Path]]:
        """All tables of that name, with the rank of their source."""
        for rank, root in enumerate((*self.ours, self.engines)):
            for folder in _version_folders(root):
                if (folder / name).exists():
                    yield rank, folder / name


def _version_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("triton_*") if sglang_table_names.is_version_folder(path.name))


def layers(sources: Sources) -> list[str]:
    """Names of the up tables that we have, of whatever Triton."""
    found = {
        path.name for root in sources.ours for folder in _version_folders(root) for path in folder.glob("E=*.json")
    }
    return sorted(filter(config_table.is_up_table, found))


def put(name: str, sources: Sources, folder: Path, version: Version) -> Outcome:
    """Put our tables of that layer into `folder`, which the running Triton's name has, unless the engine's come first.

    Raises:
        MoEExtError: the name is no table's, a table of ours is broken, or the disk refuses.
    """
    best = _best(name, sources, folder.name)
    if best.is_relative_to(sources.engines):
        return {folder / name: f"{best} comes first"}
    key = table_names.parse(name)
    up = _read(best)
    down_file = best.with_name(f"{best.stem}_down.json")
    # The engine may have a table for the down projection, with another BLOCK_SIZE_M: ours must stand before it.
    down = _read(down_file) if down_file.exists() else _as_down(up)
    up_path, down_path = folder / name, folder / down_file.name
    changes = {
        up_path: safe(up, key, version),
        down_path: safe(down, replace(key, down=True), version),
    }
    results = merge.put(changes, [(up_path, down_path)])
    return {path: result.why if isinstance(result, RefusedTable) else None for path, result in results.items()}


def _best(name: str, sources: Sources, running: str) -> Path:
    """Measured before predicted, then the running Triton's before others, then the user's, the shipped, the engine's.

    Raises:
        MoEExtError: no table of that name can be read.
    """
    ranked: list[tuple[tuple[object, ...], Path]] = []
    broken: MoEExtError | None = None
    for source, path in sources.tables(name):
        try:
            is_predicted = not _read(path).has_measured()
        except MoEExtError as error:
            broken = error
            log.warning("passed over: %s", error)
            continue
        newest_first = [-int(number) for number in re.findall(r"\d+", path.parent.name)]
        ranked.append(((is_predicted, path.parent.name != running, source, newest_first), path))
    if not ranked and broken is not None:
        raise broken
    return min(ranked)[1]


def _read(path: Path) -> StoredTable:
    return StoredTable(config_table.read(path), provenance.read(path))


def _as_down(up: StoredTable) -> StoredTable:
    """What the engine runs in the down projection where it has a table for the up projection alone."""
    return StoredTable({m: replace(config, use_tma=False) for m, config in up.table.items()}, None)


def safe(stored: StoredTable, key: TableKey, version: Version) -> StoredTable:
    """The table without USE_TMA where that engine would crash on it, or compute what is wrong."""
    if _may_use_tma(key, version):
        return stored
    return replace(stored, table={m: replace(config, use_tma=False) for m, config in stored.table.items()})


def _may_use_tma(key: TableKey, version: Version) -> bool:
    quantization = Quantization(key.scheme, key.block_shape, key.per_channel)
    # A name tells int8 weights with groups along K, for which it is wrong, from per-channel ones by this word alone.
    is_told = not key.down or key.scheme != "int8_w8a16" or key.per_channel
    return is_told and support.is_right("down" if key.down else "up", quantization, version)
