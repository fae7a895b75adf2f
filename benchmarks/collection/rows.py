"""The rows of a collection: launches of models that share a layer are one row, which is tuned once."""

from __future__ import annotations

import argparse
import hashlib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast, get_args

from sglang_moe_ext import api
from sglang_moe_ext.core import MoEExtError, MoEShape
from sglang_moe_ext.engines.adapter import EngineName


@dataclass(frozen=True, slots=True)
class Row:
    """One layer of one engine. `launches`: the arguments of `tune` of every line that comes to it, the first first."""

    engine: EngineName
    shape: MoEShape
    launches: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """What `tune` is called with."""
        return shlex.split(self.launches[0])

    @property
    def slug(self) -> str:
        """A folder's name: the same for the same layer, whatever models have it."""
        return hashlib.sha256(f"{self.engine} {self.shape}".encode()).hexdigest()[:12]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override] # raises, as that one does
        raise MoEExtError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--ep-size", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine", choices=get_args(EngineName), default="sglang")
    return parser


def parse(text: str) -> list[Row]:
    """The rows of a list: a line has the arguments of one `tune`; `#` begins a comment.

    Raises:
        MoEExtError: a line has other arguments, or its model cannot be resolved; the error names the line.
    """
    parser, launches = _parser(), dict[tuple[EngineName, MoEShape], list[str]]()
    for number, line in enumerate(text.splitlines(), 1):
        given = line.partition("#")[0].strip()
        if not given:
            continue
        try:
            asked = parser.parse_args(shlex.split(given))
            engine = cast("EngineName", asked.engine)
            ep = asked.ep_size
            layer = api.resolve(asked.model, engine=engine, tp=asked.tp_size, ep=ep, dtype=asked.dtype)
        except (MoEExtError, ValueError) as error:
            raise MoEExtError(f"line {number}: {given}: {error}") from error
        launches.setdefault((engine, layer.shape), []).append(given)
    return [Row(engine, shape, tuple(lines)) for (engine, shape), lines in launches.items()]


def describe_launches(launches: Iterable[str]) -> str:
    """The models of a row for people, such as `Qwen3-30B-A3B TP 2`."""
    parser, found = _parser(), []
    for launch in launches:
        asked = parser.parse_args(shlex.split(launch))
        sizes = [f"TP {asked.tp_size}", *([f"EP {asked.ep_size}"] if asked.ep_size > 1 else [])]
        found.append(f"{asked.model} {' '.join(sizes)}{'' if asked.dtype == 'auto' else f' {asked.dtype}'}")
    return ", ".join(found)
