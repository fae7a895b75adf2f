"""The tables that we ship: each one parses, says where it came from, and fits the GPU in its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_moe_ext.engines import config_dict, missing_config_log, table_names
from sglang_moe_ext.engines.sglang import table_names as sglang_table_names
from sglang_moe_ext.engines.vllm import table_names as vllm_naming
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.gpu.shared_memory import smem_bytes
from sglang_moe_ext.models import parse_shape
from sglang_moe_ext.serving import guard
from sglang_moe_ext.tables import config_table, plan_table, provenance

CONFIGS = Path(__file__).resolve().parents[1] / "tuned_configs" / "configs"
TABLES = sorted(path for path in CONFIGS.glob("triton_*/*.json") if config_table.is_table(path.name))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_table_is_measured_fits_its_gpu_and_has_its_own_name(path: Path) -> None:
    table, known = config_table.read(path), provenance.read(path)
    assert known is not None
    assert {known.origin(m) for m in table} == {"measured"}
    key = table_names.parse(path.name)
    (run,) = {entry.run for entry in known.entries.values()}
    shape, gpu = parse_shape(run.shape), find_gpu(missing_config_log.device_of(key))
    assert sglang_table_names.file_name(sglang_table_names.table_key(shape, run.gpu, down=key.down)) == path.name
    assert all(smem_bytes(config, shape, gpu.target) <= gpu.smem_per_block for config in table.values())
    assert all(entry.figures["us"] <= entry.figures["incumbent_us"] for entry in known.entries.values())


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_guard_of_a_server_changes_nothing_of_a_shipped_entry(path: Path) -> None:
    """In the engine that it was measured in: shared memory, TMA, blocks of scales, least tiles."""
    table, known = config_table.read(path), provenance.read(path)
    assert known is not None
    (run,) = {entry.run for entry in known.entries.values()}
    key, shape = table_names.parse(path.name), parse_shape(run.shape)
    version = tuple(map(int, str(run.engine).removeprefix("sglang ").split(".")))
    check = guard.ConfigGuard(version, find_gpu(missing_config_log.device_of(key))).check
    for config in table.values():
        entry = config_dict.config_dict_of(config)
        assert check(entry, shape, "down" if key.down else "up") == guard.SafeEntry(entry, None)


@pytest.mark.parametrize(
    "path", [path for path in TABLES if config_table.is_up_table(path.name)], ids=lambda path: path.stem
)
def test_both_shipped_tables_of_a_layer_sort_into_one_block_size(path: Path) -> None:
    """SGLang up to 0.5.12 ends the server otherwise."""
    up, down = config_table.read(path), config_table.read(path.with_name(f"{path.stem}_down.json"))
    assert {m: config.block_m for m, config in up.items()} == {m: config.block_m for m, config in down.items()}


FOR_VLLM = sorted(
    path for path in (CONFIGS.parent / "vllm").glob("triton_*/*.json") if config_table.is_table(path.name)
)


@pytest.mark.parametrize("path", FOR_VLLM, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_table_of_vllm_was_measured_with_vllm_and_has_the_name_that_it_asks_for(path: Path) -> None:
    table, known = config_table.read(path), provenance.read(path)
    assert known is not None
    assert {known.origin(m) for m in table} == {"measured"}
    (run,) = {entry.run for entry in known.entries.values()}
    assert str(run.engine).startswith("vllm ")
    shape = parse_shape(run.shape)
    assert vllm_naming.file_name(vllm_naming.table_key(shape, run.gpu)) == path.name
    assert sglang_table_names.version_folder(str(run.triton)) == path.parent.name
    gpu = find_gpu(run.gpu.removeprefix("NVIDIA "))
    assert all(smem_bytes(config, shape, gpu.target) <= gpu.smem_per_block for config in table.values())


PATHS = [plan_table.path_beside(path) for path in TABLES if plan_table.path_beside(path).exists()]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_path_was_faster_and_right_in_the_run_that_made_the_table_beside_it(path: Path) -> None:
    """Or in a later run on that GPU, and then faster as well than what the table's own run measured of its entry."""
    entries = plan_table.read(path)
    table = provenance.read(path.with_name(path.name.replace(plan_table.SUFFIX, ".json")))
    assert table is not None
    (made_table,) = {entry.run for entry in table.entries.values()}
    for m, entry in entries.items():
        if entry.run != made_table:
            assert entry.run.date > made_table.date
            for name in ("shape", "gpu", "kernel", "engine", "triton"):
                assert getattr(entry.run, name) == getattr(made_table, name)
            assert entry.plan is not None
            assert 1.01 * entry.figures["us"] < table.entries[m].figures["us"]
    won = [entry.figures for entry in entries.values() if entry.plan is not None]
    assert won
    assert all(figures["gain_low"] > 1 and figures["gain"] > 1.01 for figures in won)
    assert all(figures["relative_error"] < 5e-2 for figures in won)


def test_tables_are_shipped() -> None:
    assert TABLES
    assert FOR_VLLM
    assert PATHS
