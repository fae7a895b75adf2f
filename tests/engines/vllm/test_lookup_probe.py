"""Each real vLLM, imported anew, takes from the tables that we write the entries that we mean."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import triton

from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError, MoEShape, Quantization, Table, TileConfig
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.engines.sglang.table_names import version_folder
from sglang_moe_ext.engines.vllm import lookup_probe, table_names
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.tables import config_table, files
from tests.engines.installed import REPO_ROOT, VLLM_VERSIONS, vllm_environment

pytestmark = pytest.mark.usefixtures("forked_engines")

TOKENS = (1, 2, 3, 17, 64, 5000)
RTX_4090 = find_gpu("RTX 4090")
SHAPE = MoEShape(64, 1536, 2048, 4, Quantization("fp8_w8a8", (128, 128)))
GROUPS = MoEShape(97, 96, 256, 3, Quantization("int4_w4a16", (0, 128)))
# No two entries are alike, so that each answer names the entry that it came from; 3 lies as near to 2 as to 4.
TABLE: Table = {
    1: TileConfig(16, 32, 128, 1, 4, 2),
    2: TileConfig(16, 64, 128, 1, 4, 3),
    4: TileConfig(16, 128, 128, 1, 4, 4),
    16: TileConfig(32, 64, 128, 16, 4, 2),
    128: TileConfig(64, 64, 128, 32, 8, 3),
    4096: TileConfig(128, 64, 128, 64, 8, 2),
}
NAME = table_names.file_name(table_names.table_key(SHAPE, RTX_4090.device_name))
NEAR = (1, 2, 3, 17, 5000)
"""Not 64, which lies between keys that are made for far fewer tokens, and far more."""
EXPECTED = {m: TABLE[config_table.nearest(TABLE, m)] for m in TOKENS}


@functools.cache
def named() -> Path:
    """A folder of tables as VLLM_TUNED_CONFIG_FOLDER names one."""
    folder = Path(tempfile.mkdtemp(prefix="named-"))
    files.write_together({folder / NAME: config_table.to_json(TABLE)})
    return folder


@functools.cache
def alone(version: str) -> LookupResult:
    environment = vllm_environment(version) | {"VLLM_TUNED_CONFIG_FOLDER": str(named())}
    return lookup_probe.ALONE.ask(LookupRequest(SHAPE, TOKENS, RTX_4090), environment)


@functools.cache
def served() -> LookupResult:
    """By a server of the newest release, with our hooks in, whose user has the table in the own store."""
    store = Path(tempfile.mkdtemp(prefix="store-"))
    place = store / "tables" / "vllm" / version_folder(triton.__version__) / NAME
    files.write_together({place: config_table.to_json(TABLE)})
    environment = vllm_environment("0.33.0") | {env.STORE: str(store)}
    return lookup_probe.AS_SERVED.ask(LookupRequest(SHAPE, TOKENS, RTX_4090), environment)


every_version = pytest.mark.parametrize("version", VLLM_VERSIONS)


@every_version
def test_the_nearest_entry_of_our_table_is_taken_for_both_gemms(version: str) -> None:
    assert (alone(version).up, set(alone(version).down.values())) == (EXPECTED, {None})


@every_version
def test_the_file_that_the_engine_opened_is_ours_alone(version: str) -> None:
    assert alone(version).files == (named() / NAME,)


@every_version
def test_the_engine_logs_that_it_uses_our_file(version: str) -> None:
    assert any(f"Using configuration from {named()}" in line for line in alone(version).log)


@every_version
def test_the_answer_names_the_engine_and_the_gpu_that_it_was_told_of(version: str) -> None:
    assert (alone(version).engine_version, alone(version).device_name) == (version, RTX_4090.device_name)


def test_as_served_the_users_own_store_is_read() -> None:
    answer = served()
    assert answer.plugin == "active"
    assert [file.name for file in answer.files] == [NAME]
    assert {m: answer.up[m] for m in NEAR} == {m: EXPECTED[m] for m in NEAR}


def test_as_served_each_number_of_tokens_says_why() -> None:
    assert served().whys[17] == "your table, entry 16; origin unknown"


def test_as_served_a_number_of_tokens_that_is_far_from_every_key_runs_the_engines_default() -> None:
    assert 64 not in served().whys
    assert served().up[64] not in TABLE.values()


def test_groups_along_k_are_answered_with_the_tile_that_the_launcher_chooses() -> None:
    answer = lookup_probe.ALONE.ask(LookupRequest(GROUPS, (1, 64), RTX_4090), vllm_environment("0.33.0"))
    assert [(it.block_n, it.block_k) for it in answer.up.values()] == [(32, 64), (64, 32)]


def test_batch_invariance_passes_over_our_tables() -> None:
    environment = vllm_environment("0.33.0") | {"VLLM_TUNED_CONFIG_FOLDER": str(named())}
    assert lookup_probe.ALONE.ask(LookupRequest(SHAPE, (1,), RTX_4090, deterministic=True), environment).files == ()


def test_an_environment_without_the_engine_is_reported_in_one_line() -> None:
    environment = vllm_environment("0.33.0") | {"PYTHONPATH": str(REPO_ROOT)}
    with pytest.raises(EngineError, match=r"^vLLM's own table lookup failed: vLLM is not installed in this env"):
        lookup_probe.ALONE.ask(LookupRequest(SHAPE, (1,)), environment)
