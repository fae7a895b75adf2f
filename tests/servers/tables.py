"""Tables for the tiny model's layer on the GPU that its servers believe in, as they lie in a user's store."""

from __future__ import annotations

from pathlib import Path

from sglang_moe_ext.core import MoEShape, Table, TileConfig
from sglang_moe_ext.engines.sglang import installation, table_names
from sglang_moe_ext.tables import config_table
from tests.servers import tiny_model

SHAPE = MoEShape(
    experts=tiny_model.EXPERTS,
    intermediate_size=tiny_model.INTERMEDIATE_SIZE,
    hidden_size=tiny_model.HIDDEN_SIZE,
    top_k=tiny_model.TOP_K,
)
DEVICE_NAME = "NVIDIA H200"
OURS = TileConfig(block_m=32, block_n=16, block_k=64, group_m=4, num_warps=8, num_stages=2)
"""No default of the engine's and no table that it ships has such a tile."""
TABLE: Table = dict.fromkeys((1, 2, 4, 8, 16, 32, 64, 128), OURS)


def path_in(store: Path, shape: MoEShape = SHAPE) -> Path:
    """Where the layer's table lies, for the Triton of the tests."""
    triton = installation.running_triton()
    assert triton is not None
    name = table_names.file_name(table_names.table_key(shape, DEVICE_NAME))
    return store / "tables" / "sglang" / table_names.version_folder(triton) / name


def put(store: Path, text: str = config_table.to_json(TABLE), shape: MoEShape = SHAPE) -> Path:
    """The file with that text, in that store."""
    path = path_in(store, shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
