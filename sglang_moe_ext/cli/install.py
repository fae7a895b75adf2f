"""`sglang-moe-ext install`: put the tables of the user's own store into the engine, as after an upgrade of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sglang_moe_ext.core import EngineError, MoEExtError
from sglang_moe_ext.engines.sglang import installation
from sglang_moe_ext.tables import config_table, merge, provenance, user_store
from sglang_moe_ext.tables.merge import RefusedTable, StoredTable
from sglang_moe_ext.tuning import install_target


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    install_target.add_to(parser)


def _hidden_by(folders: Sequence[Path], target: Path, table: StoredTable) -> Path | None:
    """The table for another Triton that this one, a prediction, would hide."""
    if table.has_measured():
        return None
    found = sorted(path for folder in folders for path in folder.glob(f"triton_*/{target.name}"))
    return next((path for path in found if path != target), None)


def _put(up: Path, folder: Path, shipped: Path) -> dict[Path, str | None]:
    """For the up table and the down table beside it: why it was not put there, or None where it was."""
    down = up.with_name(f"{up.stem}_down.json")
    found = {path: StoredTable(config_table.read(path), provenance.read(path)) for path in (up, down) if path.exists()}
    targets = {folder / path.name: table for path, table in found.items()}
    for target, table in targets.items():
        hidden = _hidden_by((folder.parent, shipped), target, table)
        if hidden is not None:
            return dict.fromkeys(targets, f"a prediction would hide {hidden}")
    pairs = [(folder / up.name, folder / down.name)] if len(found) > 1 else []
    results = merge.put(targets, pairs)
    return {target: result.why if isinstance(result, RefusedTable) else None for target, result in results.items()}


def run(arguments: argparse.Namespace) -> None:
    """Install every table that was made for the running Triton; the last line printed is JSON.

    Raises:
        MoEExtError: there is no engine, or a place cannot be written.
    """
    engine = installation.find()
    triton = installation.running_triton()
    if engine is None or triton is None:
        raise EngineError("SGLang and Triton are not both installed here: run install where the server runs")
    destination = install_target.choose_for_sglang(arguments.install, arguments.output_dir, engine, triton)
    if destination is None:
        raise EngineError("--install none leaves nothing to do: choose engine or overlay")
    outcome: dict[Path, str | None] = {}
    for up in sorted(install_target.store_folder("sglang", triton).glob("E=*.json")):
        if not config_table.is_up_table(up.name):
            continue
        try:
            outcome |= _put(up, destination.folder, engine.configs_root)
        except MoEExtError as error:
            outcome[destination.folder / up.name] = str(error)
    installed = [str(path) for path, why in outcome.items() if why is None]
    kept = {str(path): why for path, why in outcome.items() if why is not None}
    for name in installed:
        print(f"wrote {name}")
    for name, why in kept.items():
        print(f"kept  {name}: {why}")
    if not installed and not kept:
        print(f"no table for Triton {triton} in {user_store.root()}")
    if destination.note:
        print(destination.note)
    print(json.dumps({"written": installed, "kept": kept, "environment": destination.environment}))
