"""Recorded runs and shipped tables, as a report reads them."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

from sglang_moe_ext.report import journal_data, table_data
from sglang_moe_ext.report.run_data import ReportedRun

REPO_ROOT = Path(__file__).resolve().parents[2]
JOURNALS = REPO_ROOT / "tests" / "data" / "journals"
QWEN = JOURNALS / "qwen3_30b_a3b_fp8_block.jsonl.gz"
GLM = JOURNALS / "glm_4_7_flash_bf16.jsonl.gz"
GLM_OWN_KERNELS = JOURNALS / "glm_4_7_flash_bf16_own_kernels.jsonl.gz"
"""The run that the shipped table GLM_H200 is from."""
SHIPPED = REPO_ROOT / "tuned_configs"
GLM_H200 = SHIPPED / "configs" / "triton_3_6_0" / "E=65,N=1536,device_name=NVIDIA_H200.json"
GLM_H100 = SHIPPED / "configs" / "triton_3_6_0" / "E=65,N=1536,device_name=NVIDIA_H100_80GB_HBM3.json"
GLM_VLLM = SHIPPED / "vllm" / "triton_3_6_0" / "E=64,N=1536,device_name=NVIDIA_H200.json"
HOSTILE = '<script>alert(1)</script> "|` [x](https://example.com) @someone \u202e $\\frac{'


@functools.cache
def of_journal(path: Path) -> ReportedRun:
    return journal_data.read(path)


@functools.cache
def of_table(path: Path) -> ReportedRun:
    return table_data.read(path)


def copied(table: Path, folder: Path) -> Path:
    """The table with all that lies beside it, in a folder of its own for the same Triton."""
    place = folder / "configs" / table.parent.name
    place.mkdir(parents=True)
    for path in table.parent.glob(f"{table.stem}*"):
        if path.name.removeprefix(table.stem)[:1] in (".", "_"):
            shutil.copy(path, place / path.name)
    return place / table.name


def changed_provenance(table: Path, **of_run: Any) -> None:
    """Other circumstances in the provenance of a copied table."""
    path = table.with_name(f"{table.stem}.provenance.json")
    document = json.loads(path.read_text())
    document["runs"][0].update(of_run)
    path.write_text(json.dumps(document))
