"""vLLM's file names, from `get_config_file_name` and `get_device_name_as_file_name` of vLLM 0.20 to 0.33."""

from __future__ import annotations

import re

from sglang_moe_ext.core import MoEShape, Scheme, TableKey
from sglang_moe_ext.engines.table_names import TableNaming
from sglang_moe_ext.schemes import find_row


def device_in_names(device_name: str) -> str:
    """The GPU's name as vLLM writes it: every H200 is one H200, whatever its form factor."""
    words = re.split(r"[\s_/]+", device_name)
    return "NVIDIA_H200" if "H200" in words else "_".join(words)


def tag(scheme: Scheme | None) -> Scheme | None:
    """The engine's own word for that scheme, in names as in calls of its lookup."""
    return scheme if find_row(scheme).vllm_tag else None


def table_key(shape: MoEShape, device_name: str) -> TableKey:
    """The key under which the engine looks for this layer's table; per-tensor and per-channel fp8 share one."""
    quantization = shape.quantization
    return TableKey(
        experts=shape.experts,
        intermediate_size=shape.intermediate_size,
        device_name=device_in_names(device_name),
        scheme=tag(quantization.scheme),
        block_shape=quantization.block_shape if quantization.is_block_wise else None,
    )


def file_name(key: TableKey) -> str:
    """The name of the file that holds this key's table."""
    return "".join(
        (
            f"E={key.experts},N={key.intermediate_size},device_name={key.device_name}",
            f",dtype={key.scheme}" if key.scheme else "",
            f",block_shape=[{key.block_shape[0]},{key.block_shape[1]}]" if key.block_shape else "",
            ".json",
        )
    )


NAMING = TableNaming(table_key, file_name, has_down=False, metadata_keys=frozenset({"triton_version"}))
