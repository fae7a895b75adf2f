"""Real SGLang servers of two ranks, with and without expert parallelism: both read the same table, and answer alike."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from benchmarks.real_servers import ranks
from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.engines import config_dict
from tests.servers import runs, tables, tiny_model
from tests.servers.runs import Run
from tests.servers.server import Site

VERSION = "0.5.15"
RANKS = 2
TP, EP = ("--tp", str(RANKS)), ("--ep-size", str(RANKS))
PADDED = tiny_model.INTERMEDIATE_SIZE * RANKS
"""The engine pads each rank's part for a CPU to blocks of 32 columns."""
LAYERS = {
    (*TP,): MoEShape(tiny_model.EXPERTS, PADDED // RANKS, tiny_model.HIDDEN_SIZE, tiny_model.TOP_K),
    (*TP, *EP): MoEShape(tiny_model.EXPERTS // RANKS, PADDED, tiny_model.HIDDEN_SIZE, tiny_model.TOP_K, ep=RANKS),
}
OURS = config_dict.config_dict_of(tables.OURS)


@dataclass(frozen=True, slots=True)
class Pair:
    """The same server with our plugin switched off, and with it."""

    off: Run
    on: Run
    layer: MoEShape


@pytest.fixture(scope="module", params=LAYERS, ids=["TP 2", "TP 2 and EP 2"])
def pair(forked_site: Site, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    store, layer = tmp_path_factory.mktemp("store"), LAYERS[request.param]
    tables.put(store, shape=layer)
    here = {"SGLANG_MOE_EXT_STORE": str(store), "SGLANG_CPU_OMP_THREADS_BIND": "0|0"}
    off, on = (forked_site, here | {"SGLANG_MOE_EXT_DISABLE": "1"}), (forked_site, here)
    return Pair(*runs.of_each(VERSION, off, on, flags=request.param), layer)


def test_every_rank_launches_the_configuration_of_our_table(pair: Pair) -> None:
    assert len({launch.pid for launch in pair.on.launches}) == RANKS
    assert [launch for launch in pair.on.launches if launch.config != OURS] == []


def test_every_rank_names_the_same_table(pair: Pair) -> None:
    lines = ranks.lines_of_ranks("\n".join(pair.on.log))
    named = {rank: [line for line in said if "your table" in line] for rank, said in lines.items()}
    assert sorted(named) == list(range(RANKS))
    assert named[0] == named[1]
    assert str(pair.layer) in named[0][0]


def test_the_tokens_are_those_without_us(pair: Pair) -> None:
    assert pair.on.tokens == pair.off.tokens
