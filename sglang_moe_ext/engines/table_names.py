"""Read the file names of both engines: they share one grammar and differ in how they write some of its parts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast, get_args

from sglang_moe_ext.core import MoEShape, Scheme, TableError, TableKey

_NAME = re.compile(
    r"E=(?P<experts>[1-9]\d*),N=(?P<n>[1-9]\d*),device_name=(?P<device>[^,/]+?)"
    r"(?:,dtype=(?P<scheme>\w+?))?"
    r"(?:,block_shape=\[(?P<block_n>[1-9]\d*), ?(?P<block_k>[1-9]\d*)\])?"
    r"(?P<per_channel>,per_channel_quant=True)?"
    r"(?P<down>_down)?\.json",
    re.ASCII,
)


def parse(name: str) -> TableKey:
    """The key that a file name of either engine stands for.

    Raises:
        TableError: no engine would ask for a file of this name.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise TableError(
            f"file name {name!r} is no table's: expected E=<experts>,N=<size>,device_name=<GPU>[,dtype=...].json"
        )
    scheme = match["scheme"]
    if scheme is not None and scheme not in get_args(Scheme):
        raise TableError(f"file name {name!r} has dtype={scheme}: expected one of {', '.join(get_args(Scheme))}")
    block = (int(match["block_n"]), int(match["block_k"])) if match["block_n"] else None
    return TableKey(
        experts=int(match["experts"]),
        intermediate_size=int(match["n"]),
        device_name=match["device"],
        scheme=cast("Scheme | None", scheme),
        block_shape=block,
        per_channel=match["per_channel"] is not None,
        down=match["down"] is not None,
    )


@dataclass(frozen=True, slots=True)
class TableNaming:
    """How one engine names its tables.

    `has_down`: the engine reads a table for the down projection alone, beside the other one. `metadata_keys`: keys of a
    table that are no number of tokens, and that the engine skips.
    """

    key: Callable[[MoEShape, str], TableKey]
    file_name: Callable[[TableKey], str]
    has_down: bool
    metadata_keys: frozenset[str] = frozenset()


def other_spelling(name: str) -> str | None:
    """The file's name as the other engine writes it: SGLang puts a space into `block_shape=[128, 128]`, vLLM does not.

    >>> other_spelling("E=8,N=64,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json")
    'E=8,N=64,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json'
    """
    spelt = name.replace(", ", ",") if ", " in name else re.sub(r"(block_shape=\[\d+),(?=\d+\])", r"\1, ", name)
    return None if spelt == name else spelt
