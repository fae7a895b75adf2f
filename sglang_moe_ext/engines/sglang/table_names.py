"""SGLang's file names, as its `get_config_file_name` makes them; the same in 0.5.8 to 0.5.23."""

from __future__ import annotations

import re

from sglang_moe_ext.core import MoEShape, TableKey
from sglang_moe_ext.engines.table_names import TableNaming


def table_key(shape: MoEShape, device_name: str, *, down: bool = False) -> TableKey:
    """The key under which the engine looks for this layer's table on the GPU of that name."""
    quantization = shape.quantization
    return TableKey(
        experts=shape.experts,
        # the engine reads w2.shape[2], and int4 lies packed in bytes
        intermediate_size=shape.intermediate_size // quantization.row.weights_per_element,
        device_name=device_name.replace(" ", "_"),
        scheme=quantization.scheme,
        block_shape=quantization.block_shape if quantization.is_block_wise else None,
        per_channel=quantization.per_channel,
        down=down,
    )


def file_name(key: TableKey) -> str:
    """The name of the file that holds this key's table."""
    return "".join(
        (
            f"E={key.experts},N={key.intermediate_size},device_name={key.device_name}",
            f",dtype={key.scheme}" if key.scheme else "",
            f",block_shape=[{key.block_shape[0]}, {key.block_shape[1]}]" if key.block_shape else "",
            ",per_channel_quant=True" if key.per_channel else "",
            "_down" if key.down else "",
            ".json",
        )
    )


def is_version_folder(name: str) -> bool:
    """True where SGLang can read the folder's name: since 0.5.12 another one makes every lookup that misses raise."""
    return re.fullmatch(r"triton_\d+(_\d+)*", name) is not None


def is_any_version_folder(name: str) -> bool:
    """True for the folder of a release or of an own build of Triton, such as triton_3_7_1+git9f3a2b1c."""
    return re.fullmatch(r"triton_\d+(_\d+)*([+._-].*)?", name) is not None


def version_folder(triton_version: str) -> str:
    """The folder of the tables that were made with this Triton."""
    return f"triton_{triton_version.replace('.', '_')}"


NAMING = TableNaming(table_key, file_name, has_down=True)
