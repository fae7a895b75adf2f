"""Each real SGLang, imported anew, takes from the tables that we write the entries that we mean."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import triton

from sglang_moe_ext.core import EngineError, MoEShape, Quantization, Table, TileConfig
from sglang_moe_ext.engines import lookup_probe
from sglang_moe_ext.engines.config_dict import tile_of
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.engines.sglang import lookup_probe as sglang_lookup_probe
from sglang_moe_ext.engines.sglang import table_names
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.tables import config_table, files
from tests.engines.installed import ENGINE_VERSIONS, REPO_ROOT, engine_environment

pytestmark = pytest.mark.usefixtures("forked_engines")

TOKENS = (1, 2, 3, 17, 64, 5000)
SHAPE = MoEShape(65, 1536, 2048, 5, Quantization("fp8_w8a8", (128, 128)))
RTX_4090 = find_gpu("RTX 4090")
QUESTION = LookupRequest(SHAPE, TOKENS, RTX_4090)

# No two entries are alike, so that each answer names the entry that it came from; 3 lies as near to 2 as to 4.
UP: Table = {
    1: TileConfig(16, 32, 128, 1, 4, 2),
    2: TileConfig(16, 64, 128, 1, 4, 3),
    4: TileConfig(16, 128, 128, 1, 4, 4),
    16: TileConfig(32, 64, 128, 16, 4, 2),
    128: TileConfig(64, 64, 128, 32, 8, 3),
    4096: TileConfig(128, 64, 128, 64, 8, 2),
}
DOWN: Table = {
    m: TileConfig(up.block_m, 64, 64, 1, up.num_warps, up.num_stages, use_tma=m > 64) for m, up in UP.items()
}  # fmt: skip


@functools.cache
def overlay() -> Path:
    """A tree of tables of our own, as SGLANG_MOE_CONFIG_DIR names one."""
    root = Path(tempfile.mkdtemp(prefix="overlay-"))
    folder = root / "configs" / table_names.version_folder(triton.__version__)
    names = {
        down: table_names.file_name(table_names.table_key(SHAPE, RTX_4090.device_name, down=down))
        for down in (False, True)
    }
    files.write_together(
        {folder / names[False]: config_table.to_json(UP), folder / names[True]: config_table.to_json(DOWN)}
    )
    return root


@functools.cache
def answered(version: str) -> LookupResult:
    environment = engine_environment(version) | {"SGLANG_MOE_CONFIG_DIR": str(overlay())}
    return sglang_lookup_probe.ALONE.ask(QUESTION, environment=environment)


every_version = pytest.mark.parametrize("version", ENGINE_VERSIONS)


@every_version
def test_the_up_gemm_takes_the_nearest_entry_of_our_table(version: str) -> None:
    assert answered(version).up == {m: UP[config_table.nearest(UP, m)] for m in TOKENS}


@every_version
def test_the_down_gemm_takes_the_nearest_entry_of_our_separate_table(version: str) -> None:
    assert answered(version).down == {m: DOWN[config_table.nearest(DOWN, m)] for m in TOKENS}


@every_version
def test_the_files_that_the_engine_opened_are_ours_alone(version: str) -> None:
    assert set(answered(version).files) == set(overlay().rglob("*.json"))


@every_version
def test_the_engine_logs_that_it_uses_our_file(version: str) -> None:
    assert any(f"Using MoE kernel config from {overlay()}" in line for line in answered(version).log)


@every_version
def test_the_answer_names_the_gpu_that_the_engine_was_told_of(version: str) -> None:
    assert answered(version).device_name == RTX_4090.device_name


def test_deterministic_inference_passes_over_our_tables() -> None:
    question = LookupRequest(SHAPE, TOKENS, RTX_4090, deterministic=True)
    environment = engine_environment("0.5.23") | {"SGLANG_MOE_CONFIG_DIR": str(overlay())}
    assert sglang_lookup_probe.ALONE.ask(question, environment=environment).files == ()


def test_a_tree_in_which_the_engines_lookup_raises_is_reported_in_one_line(tmp_path: Path) -> None:
    environment = engine_environment("0.5.23") | {"SGLANG_MOE_CONFIG_DIR": str(tmp_path)}
    with pytest.raises(EngineError, match=r"^SGLang's own table lookup failed: FileNotFoundError.*configs'$"):
        sglang_lookup_probe.ALONE.ask(QUESTION, environment=environment)


def test_an_environment_without_the_engine_is_reported_in_one_line() -> None:
    environment = engine_environment("0.5.23") | {"PYTHONPATH": str(REPO_ROOT)}
    with pytest.raises(EngineError, match=r"SGLang is not installed in this environment$"):
        sglang_lookup_probe.ALONE.ask(QUESTION, environment=environment)


def test_an_engine_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup_probe, "TIMEOUT_S", 0.5)
    with pytest.raises(EngineError, match="did not answer"):
        sglang_lookup_probe.ALONE.ask(QUESTION, environment=engine_environment("0.5.23"))


def test_a_configuration_without_warps_and_stages_is_the_one_that_triton_makes_of_it() -> None:
    entry = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 8}
    assert tile_of(entry) == TileConfig(64, 64, 32, 8, num_warps=4, num_stages=3)
