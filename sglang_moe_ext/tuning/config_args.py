"""Configurations that the user gives to be measured as they are: one on the command line, or tables in files.

The flags are those of upstream's `tuning_fused_moe_triton_sep.py`: --configs has six numbers, --cmp-configs files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_moe_ext.core import Table, TableError, TileConfig
from sglang_moe_ext.tables import config_table, provenance
from sglang_moe_ext.tuning.bench.messages import Pair

NUMBERS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
"""What the numbers of --configs are, in their order."""
Choices = dict[str, dict[int, Pair]]
"""What each thing that was given, by its name, has for each number of tokens."""
_DOWN = "_down"
_ANY_TOKENS = "1"


@dataclass(frozen=True, slots=True)
class GivenTables:
    """The tables of one file that was given; `down` from the file for the down projection beside it, if there is one.

    `name`: the file as the user wrote it.
    """

    name: str
    up: Table
    down: Table | None


def parse_choices(numbers: Sequence[int] | None, files: Iterable[Path], tokens: Sequence[int]) -> Choices:
    """All that is given: the numbers of --configs, and the files of --cmp-configs in their order.

    Raises:
        TableError: as `parse_configs` and `parse_tables`.
    """
    found: Choices = {}
    if numbers is not None:
        config = parse_configs(numbers)
        found[f"--configs {' '.join(map(str, numbers))}"] = {m: {"up": config, "down": config} for m in tokens}
    for given in parse_tables(files):
        found[given.name] = pairs_of_tables(given.up, given.down, tokens)
    return found


def refuse_two_configs(given: Choices, engine: str) -> None:
    """For an engine in which one configuration serves both GEMMs.

    Raises:
        TableError: something that was given has two, or one with USE_TMA, which serves no two GEMMs alike.
    """
    for name, by_m in given.items():
        odd = next((m for m, pair in by_m.items() if pair["up"] != pair["down"] or pair["up"].use_tma), None)
        if odd is not None:
            raise TableError(
                f"{name} has two configurations, or USE_TMA, at M={odd}: {engine} runs both GEMMs with one, without it"
            )


def parse_configs(values: Sequence[int]) -> TileConfig:
    """The configuration that the six numbers of --configs mean.

    Raises:
        TableError: they are not six, or one is impossible.
    """
    given = f"--configs {' '.join(map(str, values))}"
    if len(values) != len(NUMBERS):
        raise TableError(f"{given}: expected {len(NUMBERS)} numbers, {' '.join(NUMBERS)}; it has {len(values)}")
    entry = dict(zip(NUMBERS, values, strict=True))
    try:
        return config_table.parse({_ANY_TOKENS: entry})[int(_ANY_TOKENS)]
    except TableError as error:
        raise TableError(f"{given}: {str(error).removeprefix(f'entry {_ANY_TOKENS} has ')}") from error


def parse_tables(paths: Iterable[Path]) -> list[GivenTables]:
    """The tables in those files, in their order. What goes with another file that was given counts once.

    Raises:
        TableError: a file cannot be read, is no table, or is for the down projection and its up table is not given.
    """
    given = list(dict.fromkeys(paths))
    companions = {companion for path in given for companion in (_down_beside(path), provenance.sidecar(path))}
    return [_read(path) for path in given if path not in companions]


def _down_beside(path: Path) -> Path:
    """Where the engine looks for the table of the down projection."""
    return path.with_name(f"{path.stem}{_DOWN}{path.suffix}")


def _read(path: Path) -> GivenTables:
    if path.stem.endswith(_DOWN):
        up = path.with_name(f"{path.stem.removesuffix(_DOWN)}{path.suffix}")
        raise TableError(f"{path} is for the down projection alone: give {up}, and it is taken with that")
    down = _down_beside(path)
    return GivenTables(str(path), config_table.read(path), config_table.read(down) if down.exists() else None)


def pairs_of_tables(up: Table, down: Table | None, tokens: Iterable[int]) -> dict[int, Pair]:
    """What the engine takes from these tables for each number of tokens: the nearest entry of each.

    Without a down table both GEMMs run the up entry, the down one without TMA.
    """
    return {m: _pair(up, down, m) for m in tokens}


def _pair(up: Table, down: Table | None, tokens: int) -> Pair:
    of_up = up[config_table.nearest(up, tokens)]
    if down is None:
        return {"up": of_up, "down": replace(of_up, use_tma=False)}
    # Both GEMMs share one sort of the tokens, which is the up GEMM's.
    return {"up": of_up, "down": replace(down[config_table.nearest(down, tokens)], block_m=of_up.block_m)}
