"""Tiles of the path of two launches for few tokens, and what is valid; imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sglang_moe_ext.core import Quantization

ROWS = (1, 8, 16, 32)
"""Tokens of a tile: 1 multiplies on the vector units, more on the matrix units, whose smallest operand is 8 wide."""
COLUMNS = (4, 8, 16, 32, 64, 128)
BLOCK_K = (32, 64, 128, 256, 512, 1024)
NUM_WARPS = (1, 2, 4, 8)
NUM_STAGES = (1, 2, 3, 4, 5, 6, 8)
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
MOST_PREFETCHED = 32
FIRST_PDL_SM = 90
"""Programmatic dependent launch came with Hopper."""


@dataclass(frozen=True, slots=True)
class UpTile:
    """What one program of `up` makes: `columns` of the activations, from twice as many rows of w1."""

    rows: int
    columns: int
    block_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.block_k} w{self.num_warps} s{self.num_stages}"


@dataclass(frozen=True, slots=True)
class DownTile:
    """What one program of `down` makes: `columns` of the result, or of a part of it.

    `split`: programs that share the experts of a result; the last to end adds up. `prefetched`: slots of its first
    token whose weights it brings to L2 while it waits for `up`, where there is programmatic dependent launch.
    """

    rows: int
    columns: int
    block_k: int
    num_warps: int
    num_stages: int
    split: int = 1
    prefetched: int = 0

    def __str__(self) -> str:
        split = f" split {self.split}" if self.split > 1 else ""
        prefetch = f" p{self.prefetched}" if self.prefetched else ""
        return f"{self.rows}x{self.columns}x{self.block_k} w{self.num_warps} s{self.num_stages}{split}{prefetch}"


Tile = UpTile | DownTile


@dataclass(frozen=True, slots=True)
class FewTokensConfig:
    """Both launches. `grouped`: the tokens of one expert share a tile; else each pair, or each token, has its own.

    `wide_range`: float8 weights are multiplied as bfloat16, so that activations may exceed 65504, where float16 is inf.
    """

    up: UpTile
    down: DownTile
    grouped: bool = False
    wide_range: bool = False

    def __str__(self) -> str:
        notes = f"{' grouped' if self.grouped else ''}{' wide range' if self.wide_range else ''}"
        return f"FEW TOKENS up {self.up}, down {self.down}{notes}"


@dataclass(frozen=True, slots=True)
class FewTokensProblem:
    """What the rules look at."""

    tokens: int
    top_k: int
    intermediate_size: int
    hidden_size: int
    quantization: Quantization

    @property
    def pairs(self) -> int:
        """Of a token and an expert."""
        return self.tokens * self.top_k


@dataclass(frozen=True, slots=True)
class Rule:
    """One constraint. `why` completes "this configuration is refused:"."""

    name: str
    why: str
    keeps: Callable[[FewTokensConfig, FewTokensProblem], bool]


def _tiles(config: FewTokensConfig) -> tuple[Tile, Tile]:
    return config.up, config.down


FIRST_SM = 80
"""With the copies to shared memory in the background that the kernels are pipelined by."""


def has_known_sizes(config: FewTokensConfig) -> bool:
    """Whether its numbers are among those that were tried, whatever the layer is."""
    return _tiles_are_known(config) and config.down.split in SPLITS and 0 <= config.down.prefetched <= MOST_PREFETCHED


def _sizes_are_known(config: FewTokensConfig, problem: FewTokensProblem) -> bool:
    return _tiles_are_known(config)


def _tiles_are_known(config: FewTokensConfig) -> bool:
    return all(
        tile.rows in ROWS
        and tile.columns in COLUMNS
        and tile.block_k in BLOCK_K
        and tile.num_warps in NUM_WARPS
        and tile.num_stages in NUM_STAGES
        for tile in _tiles(config)
    )


def _feeds_the_matrix_units(config: FewTokensConfig, problem: FewTokensProblem) -> bool:
    up, down = config.up, config.down
    return (up.rows == 1 or 2 * up.columns >= 16) and (down.rows == 1 or down.columns >= 16)


def _groups_fit(config: FewTokensConfig, problem: FewTokensProblem) -> bool:
    return not config.grouped or 1 < config.up.rows == config.down.rows >= problem.tokens


def _single_rows_are_narrow(config: FewTokensConfig, problem: FewTokensProblem) -> bool:
    return config.grouped or all(tile.rows <= 16 for tile in _tiles(config))


def _scales_fit(config: FewTokensConfig, problem: FewTokensProblem) -> bool:
    """A step of the matrix units has one scale a row; the vector units take one a value of blocks, in one row."""
    block = problem.quantization.block_shape
    if block is None:
        return True
    group_n, group_k = block
    for tile in _tiles(config):
        if group_n and (group_n % tile.columns or problem.intermediate_size % group_n):
            return False
        if group_k % tile.block_k and not (tile.rows == 1 and group_n and tile.block_k % group_k == 0):
            return False
    return True


def _split_has_experts(config: FewTokensConfig, problem: FewTokensProblem) -> bool:
    return config.down.split in SPLITS and (config.grouped or config.down.split <= problem.top_k)


def _prefetch_is_bounded(config: FewTokensConfig, problem: FewTokensProblem) -> bool:
    return 0 <= config.down.prefetched <= min(MOST_PREFETCHED, problem.top_k // config.down.split)


RULES = (
    Rule("sizes", "a side of a tile, its warps or its stages are none of those that were tried", _sizes_are_known),
    Rule("matrix", "the matrix units take 16 rows of the weights at least", _feeds_the_matrix_units),
    Rule("grouped", "grouped, both tiles have the same rows, as many as there are tokens", _groups_fit),
    Rule("single", "a pair alone in its tile needs no more than 16 rows", _single_rows_are_narrow),
    Rule("scales", "a step along K, or a tile's columns, span more than one scale", _scales_fit),
    Rule(
        "split",
        "down is split into more parts than a token has experts, or into a number not tried",
        _split_has_experts,
    ),
    Rule("prefetch", "more slots are prefetched than a part of a token has", _prefetch_is_bounded),
)
"""The only statement of what a configuration may be; the launchers and the tuner both read it."""


def refusals(config: FewTokensConfig, problem: FewTokensProblem) -> tuple[Rule, ...]:
    """The rules that this configuration breaks."""
    return tuple(rule for rule in RULES if not rule.keeps(config, problem))


_16_BITS = {
    1: (
        FewTokensConfig(UpTile(1, 16, 256, 4, 3), DownTile(1, 16, 256, 4, 4)),
        FewTokensConfig(UpTile(16, 32, 128, 4, 3), DownTile(1, 8, 512, 4, 3)),
    ),
    2: (
        FewTokensConfig(UpTile(8, 32, 128, 4, 3), DownTile(1, 8, 512, 4, 3)),
        FewTokensConfig(UpTile(1, 4, 512, 4, 3), DownTile(1, 8, 512, 4, 3)),
    ),
    4: (
        FewTokensConfig(UpTile(1, 8, 512, 4, 3), DownTile(1, 16, 512, 4, 4, prefetched=1)),
        FewTokensConfig(UpTile(16, 32, 128, 4, 5), DownTile(16, 64, 128, 4, 4, split=4), grouped=True),
    ),
    16: (
        FewTokensConfig(UpTile(16, 32, 128, 4, 4), DownTile(16, 64, 128, 4, 4, split=8), grouped=True),
        FewTokensConfig(UpTile(16, 32, 128, 4, 4), DownTile(16, 64, 256, 4, 3, split=8), grouped=True),
    ),
    32: (
        FewTokensConfig(UpTile(32, 32, 128, 4, 3), DownTile(32, 64, 256, 4, 3, split=8), grouped=True),
        FewTokensConfig(UpTile(32, 32, 128, 4, 5), DownTile(32, 64, 128, 4, 4, split=4), grouped=True),
    ),
}
_8_BITS = {
    1: (
        FewTokensConfig(UpTile(8, 16, 128, 2, 5), DownTile(8, 64, 128, 4, 4, split=8)),
        FewTokensConfig(UpTile(8, 8, 128, 1, 6), DownTile(8, 64, 128, 4, 4, split=2)),
    ),
    2: (
        FewTokensConfig(UpTile(8, 32, 128, 4, 4), DownTile(8, 64, 128, 4, 4, split=4)),
        FewTokensConfig(UpTile(8, 8, 128, 1, 6), DownTile(8, 64, 128, 4, 4, split=2)),
    ),
    4: (
        FewTokensConfig(UpTile(8, 64, 128, 4, 4), DownTile(8, 128, 128, 4, 4, split=8)),
        FewTokensConfig(UpTile(8, 16, 128, 2, 5), DownTile(8, 64, 128, 4, 4, split=8, prefetched=1), grouped=True),
    ),
    8: (
        FewTokensConfig(UpTile(8, 16, 128, 2, 5), DownTile(8, 128, 128, 4, 4, split=8)),
        FewTokensConfig(UpTile(8, 32, 128, 2, 4), DownTile(8, 64, 128, 4, 4, split=8, prefetched=1), grouped=True),
    ),
}


def contenders(problem: FewTokensProblem) -> tuple[FewTokensConfig, ...]:
    """What to race for these tokens, the likeliest first; none where the path never won.

    The fastest of `benchmarks/few_tokens.py` for four layers: H100, SGLang 0.5.15, Triton 3.6.0, 2026-11-26.
    """
    by_tokens = _16_BITS if problem.quantization.weight_bits == 16 else _8_BITS
    nearest = next((most for most in by_tokens if problem.tokens <= most), None)
    chosen = () if nearest is None else by_tokens[nearest]
    return tuple(config for config in chosen if not refusals(config, problem))
