"""Real SGLang servers, with our wheel installed beside them: what their MoE layers launch, say and compute."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sglang_moe_ext.engines import config_dict
from tests.servers import runs, tables
from tests.servers.runs import Run
from tests.servers.server import Site

VERSIONS = ("0.5.12", "0.5.15", "0.5.18", "0.5.20", "0.5.23")
OURS = config_dict.config_dict_of(tables.OURS)


@dataclass(frozen=True, slots=True)
class Pair:
    """The same server with our plugin switched off, and with it."""

    off: Run
    on: Run


@pytest.fixture(scope="module", params=VERSIONS)
def pair(
    site: Site, forked_site: Site, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    """The newest release with our plugin starts as a user's server does, the others are forked."""
    store = tmp_path_factory.mktemp("store")
    tables.put(store)
    here = {"SGLANG_MOE_EXT_STORE": str(store)}
    off = forked_site, here | {"SGLANG_MOE_EXT_DISABLE": "1"}
    on = site if request.param == VERSIONS[-1] else forked_site, here
    return Pair(*runs.of_each(request.param, off, on))


def test_every_launch_has_the_configuration_of_our_table(pair: Pair) -> None:
    assert {launch.gemm for launch in pair.on.launches} == {"up", "down"}
    assert [launch for launch in pair.on.launches if launch.config != OURS] == []


def test_the_tokens_are_those_without_us(pair: Pair) -> None:
    assert pair.on.tokens == pair.off.tokens


def test_a_process_that_runs_layers_says_once_that_we_are_active(pair: Pair) -> None:
    said = pair.on.lines("sglang-moe-ext", "is active")
    assert len(said) == len({launch.pid for launch in pair.on.launches}), said


def test_the_table_that_a_layer_runs_is_named_once_in_the_log(pair: Pair) -> None:
    (line,) = pair.on.lines("sglang-moe-ext", "your table")
    assert str(tables.SHAPE) in line


def test_switched_off_no_launch_is_ours(pair: Pair) -> None:
    assert {launch.gemm for launch in pair.off.launches} == {"up", "down"}
    assert [launch for launch in pair.off.launches if launch.config == OURS] == []


def test_switched_off_we_say_nothing(pair: Pair) -> None:
    assert pair.off.lines("sglang-moe-ext") == []
