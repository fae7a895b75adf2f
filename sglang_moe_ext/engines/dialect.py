"""How an engine names its tables: what a place of tables needs to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sglang_moe_ext.core import MoEShape, TableKey


@dataclass(frozen=True, slots=True)
class Dialect:
    """`has_down`: the engine reads a table for the down projection alone, beside the other one."""

    key: Callable[[MoEShape, str], TableKey]
    file_name: Callable[[TableKey], str]
    has_down: bool
