"""The tables that we ship: each one parses, says where it came from, and fits the GPU in its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_moe_ext import gpus
from sglang_moe_ext.engines import names
from sglang_moe_ext.engines.sglang import naming, warning_line
from sglang_moe_ext.shapes import parse_shape
from sglang_moe_ext.shared_memory import smem_bytes
from sglang_moe_ext.store import provenance, tables

CONFIGS = Path(__file__).resolve().parents[1] / "tuned_configs" / "configs"
TABLES = sorted(path for path in CONFIGS.glob("triton_*/*.json") if not path.name.endswith(".provenance.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_table_is_measured_fits_its_gpu_and_has_its_own_name(path: Path) -> None:
    table, known = tables.read(path), provenance.read(path)
    assert known is not None
    assert {known.origin(m) for m in table} == {"measured"}
    key = names.parse(path.name)
    (run,) = {entry.run for entry in known.entries.values()}
    shape, gpu = parse_shape(run.shape), gpus.find(warning_line.device_of(key))
    assert naming.file_name(naming.table_key(shape, run.gpu, down=key.down)) == path.name
    assert all(smem_bytes(config, shape, gpu.sm) <= gpu.smem_per_block for config in table.values())
    assert all(entry.figures["us"] <= entry.figures["incumbent_us"] for entry in known.entries.values())


def test_tables_are_shipped() -> None:
    assert TABLES
