"""Layers that ask a small card for too much: by a table that was made for a big one, or by the engine's own default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import MoEShape, Quantization, TileConfig
from sglang_moe_ext.engines.sglang import table_names
from sglang_moe_ext.tables import config_table, files

TOKENS = (1, 64, 1024, 4096, 16384)


@dataclass(frozen=True, slots=True)
class Workload:
    """A layer; `table`: what the user's table says for every M, None where there is none."""

    name: str
    shape: MoEShape
    table: TileConfig | None = None

    @property
    def configured_by(self) -> str:
        """Whose configuration the engine takes."""
        return "the engine's default" if self.table is None else "a table for a big card"


GLM_BF16 = Workload(
    "GLM-4.7-Flash bf16",
    MoEShape(experts=65, intermediate_size=1536, hidden_size=2048, top_k=5, fused_shared=1),
    TileConfig(128, 256, 64, 16, 8, 4),
)
WORKLOADS = (
    GLM_BF16,
    Workload("64 experts, fp8 per tensor", MoEShape(64, 1536, 2048, 4, Quantization("fp8_w8a8"))),
    Workload("64 experts, fp8 block", MoEShape(64, 1536, 2048, 4, Quantization("fp8_w8a8", (128, 128)))),
    Workload(
        "Qwen3-30B-A3B fp8 block",
        MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128))),
        TileConfig(128, 128, 128, 16, 8, 4),
    ),
)


def write_tables(folder: Path, device_name: str, triton: str) -> None:
    """What SGLANG_MOE_CONFIG_DIR can name: the tables of all workloads that have one, for that GPU and Triton."""
    tables_folder = folder / "configs" / f"triton_{triton.replace('.', '_')}"
    tables_folder.mkdir(parents=True, exist_ok=True)
    contents = {
        tables_folder / table_names.file_name(table_names.table_key(workload.shape, device_name)): config_table.to_json(
            dict.fromkeys(TOKENS, workload.table)
        )
        for workload in WORKLOADS
        if workload.table is not None
    }
    files.write_together(contents)
