"""A table as JSON, the form that both engines read: parsed strictly, since files come from anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_moe_ext.core import Table, TableError, TileConfig
from sglang_moe_ext.tables import files

_FIELDS = {
    "BLOCK_SIZE_M": "block_m",
    "BLOCK_SIZE_N": "block_n",
    "BLOCK_SIZE_K": "block_k",
    "GROUP_SIZE_M": "group_m",
    "num_warps": "num_warps",
    "num_stages": "num_stages",
}
_POWERS_OF_TWO = frozenset({"BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps"})
_LARGEST = {"BLOCK_SIZE_M": 1024, "BLOCK_SIZE_N": 1024, "BLOCK_SIZE_K": 1024, "num_warps": 32, "num_stages": 16}
# Where a table names no warps or stages, Triton takes these.
_TRITON_DEFAULTS = {"num_warps": 4, "num_stages": 3}
# Options of other vendors' Triton and of vLLM's files: harmless to read, and no part of a configuration of ours.
_PASSED_OVER = frozenset({"SPLIT_K", "waves_per_eu", "matrix_instr_nonkdim", "kpack", "num_ctas"})
_TOKENS = re.compile(r"[1-9][0-9]{0,18}")


_BESIDE = (".provenance.json", ".paths.json")


def is_table(name: str) -> bool:
    """Whether a file of that name is a table, rather than what lies beside one."""
    return name.endswith(".json") and not name.endswith(_BESIDE)


def is_up_table(name: str) -> bool:
    """The same, and not for the down projection alone."""
    return is_table(name) and not name.endswith("_down.json")


def read(path: Path) -> Table:
    """The table in that file.

    Raises:
        TableError: it cannot be read, or is no table; the message names the file and the first thing wrong.
    """
    try:
        data = files.read_bounded(path)
    except OSError as error:
        raise TableError(f"cannot read table {path}: {error.strerror}") from error
    try:
        return parse(json.loads(data.decode("utf-8")))  # as the engines read it: no byte order mark, no other encoding
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path} is not valid JSON ({error}): delete it or tune again") from error
    except TableError as error:
        raise TableError(f"{path}: {error}") from error


def parse(document: object) -> Table:
    """The table that a JSON document means; vLLM's `triton_version` beside the entries is passed over.

    Raises:
        TableError: it is no table.
    """
    if not isinstance(document, Mapping):
        raise TableError(f"expected an object of M -> configuration, found {type(document).__name__}")
    table: Table = {}
    for text, entry in document.items():
        if text == "triton_version":
            continue
        if not _TOKENS.fullmatch(text):
            raise TableError(f"key {text!r}: expected a number of tokens such as 64")
        table[int(text)] = _entry(text, entry)
    if not table:
        raise TableError("it has no entries")
    return dict(sorted(table.items()))


def _entry(text: str, entry: object) -> TileConfig:
    if not isinstance(entry, Mapping):
        raise TableError(f"entry {text}: expected an object, found {type(entry).__name__}")
    unknown = sorted(set(entry) - set(_FIELDS) - _PASSED_OVER - {"USE_TMA"})
    if unknown:
        raise TableError(f"entry {text} has {unknown[0]!r}: expected only {', '.join(_FIELDS)}, USE_TMA")
    values = {ours: _number(text, name, entry) for name, ours in _FIELDS.items()}
    use_tma = entry.get("USE_TMA", False)
    if not isinstance(use_tma, bool):
        raise TableError(f"entry {text} has USE_TMA={use_tma!r}: expected true or false")
    return TileConfig(**values, use_tma=use_tma)


def _number(text: str, name: str, entry: Mapping[str, Any]) -> int:
    value = entry.get(name, _TRITON_DEFAULTS.get(name))
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST.get(name, 4096):
        found = "nothing" if value is None else repr(value)
        raise TableError(
            f"entry {text} has {name}={found}: expected a whole number from 1 to {_LARGEST.get(name, 4096)}"
        )
    if name in _POWERS_OF_TWO and value & (value - 1):
        raise TableError(f"entry {text} has {name}={value}: expected a power of two")
    return value


def to_json(table: Table, *, triton_version: str | None = None, with_split_k: bool = False) -> str:
    """The file's text. USE_TMA stands only where it is on: an engine that does not know it must not meet it.

    vLLM's dialect alone has a `triton_version` beside the entries, and a SPLIT_K of 1 in each.
    """
    document: dict[str, object] = {} if triton_version is None else {"triton_version": triton_version}
    document |= {
        str(m): {name: getattr(config, ours) for name, ours in _FIELDS.items()}
        | ({"USE_TMA": True} if config.use_tma else {})
        | ({"SPLIT_K": 1} if with_split_k else {})
        for m, config in sorted(table.items())
    }
    return json.dumps(document, indent=4) + "\n"


def nearest(table: Table, tokens: int) -> int:
    """The M whose entry both engines take for that many tokens: nearest by absolute distance, the first of equals."""
    return min(table, key=lambda m: abs(m - tokens))
