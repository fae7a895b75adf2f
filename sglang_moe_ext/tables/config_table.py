"""A table as JSON, the form that both engines read: parsed strictly, since files come from anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_moe_ext.core import Table, TableError, TileConfig
from sglang_moe_ext.tables import files
from sglang_moe_ext.untrusted import show

FIELDS = {
    "BLOCK_SIZE_M": "block_m",
    "BLOCK_SIZE_N": "block_n",
    "BLOCK_SIZE_K": "block_k",
    "GROUP_SIZE_M": "group_m",
    "num_warps": "num_warps",
    "num_stages": "num_stages",
}
ROCM_OPTIONS = {"waves_per_eu": 0, "matrix_instr_nonkdim": 0, "kpack": 1}
"""Options of Triton for AMD GPUs, fields of a `TileConfig` of the same names, and what Triton takes without them."""
_POWERS_OF_TWO = frozenset({"BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps"})
_LARGEST = {"BLOCK_SIZE_M": 1024, "BLOCK_SIZE_N": 1024, "BLOCK_SIZE_K": 1024, "num_warps": 32, "num_stages": 16}
_LARGEST |= {"waves_per_eu": 16, "matrix_instr_nonkdim": 64, "kpack": 8}
_LEAST = {"waves_per_eu": 0, "matrix_instr_nonkdim": 0}
# Where a table names no warps or stages, Triton takes these.
_TRITON_DEFAULTS = {"num_warps": 4, "num_stages": 3, **ROCM_OPTIONS}
# Options of Triton and of vLLM's files: harmless to read, and no part of a configuration of ours.
_PASSED_OVER = frozenset({"SPLIT_K", "num_ctas"})
_OF_A_TILE = FIELDS | {name: name for name in ROCM_OPTIONS}
_KNOWN_NAMES = frozenset(_OF_A_TILE) | _PASSED_OVER | {"USE_TMA"}
_MOST_TOKENS = 10**18
_LARGEST_NUMBER = 2**20
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
    document = files.read_json(path)
    try:
        return parse(document)
    except TableError as error:
        raise TableError(f"{show(str(path))}: {error}") from error


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
            raise TableError(f"key {show(text)!r}: expected a number of tokens such as 64")
        table[int(text)] = _entry(text, entry)
    if not table:
        raise TableError("it has no entries")
    return dict(sorted(table.items()))


def _entry(text: str, entry: object) -> TileConfig:
    if not isinstance(entry, Mapping):
        raise TableError(f"entry {text}: expected an object, found {type(entry).__name__}")
    unknown = sorted(set(entry) - _KNOWN_NAMES)
    if unknown:
        raise TableError(f"entry {text} has {show(unknown[0])!r}: expected only {', '.join(FIELDS)}, USE_TMA")
    values = {ours: _number(text, name, entry) for name, ours in _OF_A_TILE.items()}
    use_tma = entry.get("USE_TMA", False)
    if not isinstance(use_tma, bool):
        raise TableError(f"entry {text} has USE_TMA={show(use_tma)}: expected true or false")
    return TileConfig(**values, use_tma=use_tma)


def _number(text: str, name: str, entry: Mapping[str, Any]) -> int:
    value = entry.get(name, _TRITON_DEFAULTS.get(name))
    least, most = _LEAST.get(name, 1), _LARGEST.get(name, 4096)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        found = "nothing" if value is None else show(value)
        raise TableError(f"entry {text} has {name}={found}: expected a whole number from {least} to {most}")
    if name in _POWERS_OF_TWO and value & (value - 1):
        raise TableError(f"entry {text} has {name}={value}: expected a power of two")
    return value


@dataclass(frozen=True, slots=True)
class LoadedTable:
    """A table that comes from anywhere, as far as it can be used.

    `options`: launch options that a TileConfig does not have, by M; the engines pass them on to Triton. `foreign_keys`:
    keys that are no number, on which SGLang's lookup raises. `remarks`: everything else that is odd.
    """

    table: Table
    options: Mapping[int, Mapping[str, Any]]
    foreign_keys: tuple[str, ...]
    has_byte_order_mark: bool
    remarks: tuple[str, ...]


_MOST_REMARKS = 8


def load(path: Path) -> LoadedTable:
    """The entries of a file that can be used; one that cannot is left out with a remark.

    Raises:
        TableError: the file cannot be read, or none of its entries can be used.
    """
    document, has_mark = files.read_json_with_mark(path)
    try:
        return _load(document, has_mark)
    except TableError as error:
        raise TableError(f"{show(str(path))}: {error}") from error


def _load(document: object, has_mark: bool) -> LoadedTable:
    if not isinstance(document, Mapping):
        raise TableError(f"expected an object of M -> configuration, found {type(document).__name__}")
    table: Table = {}
    options: dict[int, dict[str, Any]] = {}
    foreign: list[str] = []
    remarks: list[str] = []
    for text, entry in document.items():
        try:
            tokens = int(text)
        except ValueError:
            foreign.append(show(text, 40))
            continue
        if not 0 < tokens < _MOST_TOKENS:
            remarks.append(f"key {show(text, 40)!r}: expected a number of tokens such as 64")
            continue
        try:
            table[tokens] = parse_tile(entry)
        except TableError as error:
            remarks.append(f"entry {tokens} is left out: {error}")
            continue
        if more := {name: it for name, it in entry.items() if name not in _KNOWN_NAMES}:
            options[tokens] = more
    if not table:
        raise TableError("; ".join(remarks[:1]) or "it has no entries")
    if names := sorted({name for more in options.values() for name in more}):
        remarks.append(f"launch options that are passed on to Triton as they are: {show(', '.join(names))}")
    if len(remarks) > _MOST_REMARKS:
        remarks[_MOST_REMARKS:] = [f"and {len(remarks) - _MOST_REMARKS} more"]
    return LoadedTable(dict(sorted(table.items())), options, tuple(foreign), has_mark, tuple(remarks))


def parse_tile(entry: object) -> TileConfig:
    """The configuration that an entry of a stranger's table means, whether Triton can compile it or not; 2.0 is 2.

    Raises:
        TableError: it is no configuration.
    """
    if not isinstance(entry, Mapping):
        raise TableError(f"expected an object, found {type(entry).__name__}")
    values = {
        ours: _parse_number(name, entry.get(name, _TRITON_DEFAULTS.get(name))) for name, ours in _OF_A_TILE.items()
    }
    return TileConfig(**values, use_tma=bool(entry.get("USE_TMA", False)))


def _parse_number(name: str, value: object) -> int:
    least, most = 0 if name == "num_stages" else _LEAST.get(name, 1), _LARGEST.get(name, _LARGEST_NUMBER)
    match value:
        case bool():
            pass
        case int() if least <= value <= most:
            return value
        case float() if value.is_integer() and least <= value <= most:
            return int(value)
    found = "nothing" if value is None else show(value, 40)
    raise TableError(f"{name}={found}: expected a whole number from {least} to {most}")


def to_json(table: Table, *, triton_version: str | None = None, with_split_k: bool = False) -> str:
    """The file's text. USE_TMA stands only where it is on: an engine that does not know it must not meet it.

    So do options for AMD GPUs where they are not Triton's defaults: Triton for NVIDIA GPUs refuses them.
    vLLM's dialect alone has a `triton_version` beside the entries, and a SPLIT_K of 1 in each.
    """
    document: dict[str, object] = {} if triton_version is None else {"triton_version": triton_version}
    document |= {
        str(m): {name: getattr(config, ours) for name, ours in FIELDS.items()}
        | rocm_options(config)
        | ({"USE_TMA": True} if config.use_tma else {})
        | ({"SPLIT_K": 1} if with_split_k else {})
        for m, config in sorted(table.items())
    }
    return json.dumps(document, indent=4) + "\n"


def rocm_options(config: TileConfig) -> dict[str, int]:
    """The options for AMD GPUs in which it differs from Triton's defaults."""
    return {name: value for name, default in ROCM_OPTIONS.items() if (value := getattr(config, name)) != default}


def nearest(table: Table, tokens: int) -> int:
    """The M whose entry both engines take for that many tokens: nearest by absolute distance, the first of equals."""
    return min(table, key=lambda m: abs(m - tokens))
