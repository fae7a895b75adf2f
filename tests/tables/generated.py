"""Tables, configurations and provenance that hypothesis makes up: everything that the store may have to hold."""

from __future__ import annotations

from hypothesis import strategies as st

from sglang_moe_ext.core import TileConfig
from sglang_moe_ext.few_tokens_config import (
    BLOCK_K,
    COLUMNS,
    NUM_STAGES,
    NUM_WARPS,
    ROWS,
    SPLITS,
    DownTile,
    FewTokensConfig,
    UpTile,
)
from sglang_moe_ext.kernel_plans import (
    DownConfig,
    KernelPlan,
    ShortKDownConfig,
    UpConfig,
    WarpSpecializedDown,
    WarpSpecializedUp,
)
from sglang_moe_ext.tables.provenance import Provenance, ProvenanceEntry, TuningRun


def powers_of_two(lowest: int, highest: int) -> st.SearchStrategy[int]:
    return st.sampled_from([1 << bit for bit in range(11) if lowest <= 1 << bit <= highest])


token_counts = st.one_of(st.integers(1, 64), st.integers(1, 2**31))

configs = st.builds(
    TileConfig,
    block_m=powers_of_two(1, 1024),
    block_n=powers_of_two(1, 1024),
    block_k=powers_of_two(1, 1024),
    group_m=st.integers(1, 4096),
    num_warps=powers_of_two(1, 32),
    num_stages=st.integers(1, 16),
    use_tma=st.booleans(),
)

tables = st.dictionaries(token_counts, configs, min_size=1, max_size=6)

runs = st.builds(
    TuningRun,
    **dict.fromkeys(("date", "command", "model", "shape", "gpu", "kernel", "sglang_moe_ext"), st.text(max_size=8)),
    **dict.fromkeys(("engine", "triton", "torch", "driver"), st.none() | st.text(max_size=8)),
    seed=st.integers(0, 2**63),
)

figures = st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False), max_size=3)

provenances = st.dictionaries(
    token_counts,
    st.builds(ProvenanceEntry, st.sampled_from(["measured", "transferred", "predicted"]), runs, figures),
    max_size=4,
).map(Provenance)

A_RUN = TuningRun("2026-11-21", "tune", "model", "shape", "gpu", "kernel", "0.5.23", "3.7.1", "2.13.0", None, 0, "1")


def config(block_n: int = 64) -> TileConfig:
    return TileConfig(16, block_n, 64, 1, 4, 3)


_side, _warps, _count = powers_of_two(16, 128), powers_of_two(1, 16), st.integers(1, 8)
_crew = (st.booleans(), _count)
_warp_specialized = (_count, st.sampled_from(WarpSpecializedUp.STAGES), st.booleans())
paths = st.builds(
    KernelPlan,
    st.builds(TileConfig, st.just(128), _side, _side, _count, _warps, _count)
    | st.builds(WarpSpecializedUp, *_warp_specialized)
    | st.builds(UpConfig, st.just(128), _side, _side, _count, _warps, _count, *_crew, st.booleans(), st.booleans()),
    st.builds(DownConfig, _side, _side, _side, _count, _warps, _count, *_crew, st.booleans())
    | st.builds(ShortKDownConfig, _side, _side, _side, _count, _warps, _count)
    | st.builds(WarpSpecializedDown, st.sampled_from(["wide", "pair"]), *_warp_specialized),
)

_tile = tuple(map(st.sampled_from, (ROWS, COLUMNS, BLOCK_K, NUM_WARPS, NUM_STAGES)))
plans_for_few_tokens = st.builds(
    FewTokensConfig,
    st.builds(UpTile, *_tile),
    st.builds(DownTile, *_tile, st.sampled_from(SPLITS), st.integers(0, 32)),
    st.booleans(),
    st.booleans(),
)
