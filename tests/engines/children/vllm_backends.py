"""Child of test_backends: asks the vLLM on PYTHONPATH whether Marlin takes a layer, and how fp8 blocks are refined.

stdin: {"marlin": [[hidden, columns, group, pads], ...], "blocks": [[columns, hidden, ranks], ...]}.
Last line of stdout: {"marlin": [true, ...], "blocks": [[64, 64] or null, ...], null where it refines none}.
"""

from __future__ import annotations

import inspect
import json
import sys
from types import SimpleNamespace

from vllm.model_executor.layers.quantization.utils import marlin_utils


def marlin_takes(hidden: int, columns: int, group: int, pads: bool) -> bool:
    moe_config = SimpleNamespace(hidden_dim=hidden, intermediate_size_per_partition_unpadded=columns)
    layer = SimpleNamespace(
        hidden_size=hidden,
        intermediate_size_per_partition=columns,
        apply_router_weight_on_input=False,
        moe_config=moe_config,
    )
    check = marlin_utils.check_moe_marlin_supports_layer
    can_pad = "allow_tile_padding" in inspect.signature(check).parameters
    return bool(check(layer, group, **({"allow_tile_padding": pads} if can_pad else {})))


def refined(columns: int, hidden: int, ranks: int) -> list[int] | None:
    try:
        from vllm.model_executor.layers.fused_moe.oracle.fp8 import refine_fp8_moe_block_shape
    except ImportError:
        return None
    config = SimpleNamespace(intermediate_size_per_partition=columns, hidden_dim=hidden, tp_size=ranks)
    found: list[int] | None = refine_fp8_moe_block_shape(config, [128, 128])
    return found


if __name__ == "__main__":
    request = json.load(sys.stdin)
    answers = {
        "marlin": [marlin_takes(*case) for case in request["marlin"]],
        "blocks": [refined(*case) for case in request["blocks"]],
    }
    print(json.dumps(answers))
