"""Put the tables of the user's own store into the engine's folder, as after an upgrade of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_moe_ext.core import EngineError, MoEExtError
from sglang_moe_ext.engines import table_names
from sglang_moe_ext.engines.adapter import EngineAdapter, EngineName
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.tables import config_table, merge, provenance, user_store
from sglang_moe_ext.tables.merge import RefusedTable, StoredTable
from sglang_moe_ext.tuning import install_target
from sglang_moe_ext.tuning.install_target import Install, InstallTarget


@dataclass(frozen=True, slots=True)
class Reinstalled:
    """What became of the tables of one engine.

    `kept`: why a table was not written, by where it would lie, or by the stored file where that is broken.
    `other_tritons`: the number of tables in the store for each other Triton, by the name of its folder.
    """

    engine: EngineName
    triton: str
    written: tuple[Path, ...]
    kept: dict[Path, str]
    target: InstallTarget
    other_tritons: dict[str, int]


def reinstall(engine_name: EngineName, where: Install, output_dir: Path | None) -> Reinstalled:
    """Install every table that was made for the running Triton.

    Raises:
        MoEExtError: the engine is not installed, or a place cannot be written.
    """
    adapter = ENGINES[engine_name]
    engine = adapter.find()
    if engine is None or engine.triton is None:
        raise EngineError(f"{adapter.TITLE} and Triton are not both installed here: run install where the server runs")
    target = install_target.CHOOSERS[engine_name](where, output_dir, engine, engine.triton)
    if target is None:
        raise EngineError("--install none leaves nothing to do: choose engine or overlay")
    stored = install_target.store_folder(engine_name, engine.triton)
    outcome: dict[Path, str | None] = {}
    for up in _up_tables(stored) if target.folder != stored else ():
        outcome |= _put_or_skip(up, target.folder, adapter, engine.triton, _folders_that_hide(target, engine))
    return Reinstalled(
        engine=engine_name,
        triton=engine.triton,
        written=tuple(path for path, why in outcome.items() if why is None),
        kept={path: why for path, why in outcome.items() if why is not None},
        target=target,
        other_tritons=_other_tritons(engine_name, stored),
    )


def _up_tables(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("E=*.json") if config_table.is_up_table(path.name))


def _other_tritons(engine: EngineName, stored: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path in user_store.all_tables(engine):
        if path.parent != stored and config_table.is_up_table(path.name):
            counts[path.parent.name] = counts.get(path.parent.name, 0) + 1
    return counts


def _folders_that_hide(target: InstallTarget, engine: object) -> Sequence[Path]:
    """Where a table for another Triton may lie, which a prediction must not hide. Files of vLLM lie side by side."""
    if target.is_flat:
        return ()
    shipped = getattr(engine, "configs_root", None)
    return [target.folder.parent, *([] if shipped is None else [shipped])]


def _hidden_by(folders: Sequence[Path], place: Path, table: StoredTable) -> Path | None:
    """The table for another Triton that this one, a prediction, would hide."""
    if table.has_measured():
        return None
    found = sorted(path for folder in folders for path in folder.glob(f"triton_*/{place.name}"))
    return next((path for path in found if path != place), None)


def _put_or_skip(
    up: Path, folder: Path, adapter: EngineAdapter, triton: str, folders_that_hide: Sequence[Path]
) -> dict[Path, str | None]:
    """As `_put`; a stored table that cannot be read costs itself alone."""
    try:
        return _put(up, folder, adapter, triton, folders_that_hide)
    except MoEExtError as error:
        return {up: str(error)}


def _put(
    up: Path, folder: Path, adapter: EngineAdapter, triton: str, folders_that_hide: Sequence[Path]
) -> dict[Path, str | None]:
    """For the up table and the down table beside it: why it was not written, or None where it was.

    A file that is named as the other engine spells names gets the name that this engine asks for.
    """
    key = table_names.parse(up.name)
    names = {up: adapter.file_name(key)}
    down = up.with_name(f"{up.stem}_down.json")
    if adapter.HAS_DOWN_TABLES and down.exists():
        names[down] = adapter.file_name(replace(key, down=True))
    tables = {
        folder / name: StoredTable(config_table.read(path), provenance.read(path)) for path, name in names.items()
    }
    for place, table in tables.items():
        hidden = _hidden_by(folders_that_hide, place, table)
        if hidden is not None:
            return dict.fromkeys(tables, f"a prediction would hide {hidden}")
    pairs = [(folder / names[up], folder / names[down])] if down in names else []
    results = merge.put(tables, pairs, lambda table: adapter.table_text(table, triton))
    return {place: result.why if isinstance(result, RefusedTable) else None for place, result in results.items()}


def triton_of(folder: str) -> str:
    """The version that a folder `triton_X_Y_Z` is named after."""
    return folder.removeprefix("triton_").replace("_", ".")
