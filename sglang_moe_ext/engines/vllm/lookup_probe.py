"""Ask the real vLLM, in a fresh process and through its own lookup, which entry it takes for each M."""

from __future__ import annotations

import os
import sys
from typing import Any

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines import lookup_probe, probe_child
from sglang_moe_ext.engines.lookup_args import LookupLayer
from sglang_moe_ext.engines.probe_child import LogCapture
from sglang_moe_ext.engines.vllm import bootstrap, installation, table_names
from sglang_moe_ext.engines.vllm.installation import LAYER_MODULE, VllmInstallation

ALONE = lookup_probe.engine_alone("vLLM", "sglang_moe_ext.engines.vllm.lookup_probe")
AS_SERVED = lookup_probe.engine_as_served("vLLM", "vllm")
FROM_FILES = lookup_probe.engine_from_files("vLLM", "vllm")


def import_engine() -> tuple[VllmInstallation, Any]:
    """The engine, and its module of the table lookup; all that takes long is imported then."""
    engine = installation.find()
    if engine is None:
        raise MoEExtError("vLLM is not installed in this environment")
    return engine, bootstrap.import_engine(LAYER_MODULE)


def layer_of(request: dict[str, Any]) -> LookupLayer:
    """The layer that a request is about, as this engine's calls state it."""
    return lookup_probe.layer_of(request | {"scheme": table_names.tag(request["scheme"]), "per_channel": False})


def _whole(module: Any, entry: dict[str, Any], layer: LookupLayer, tokens: int) -> dict[str, Any]:
    """The entry with the tile that the launcher gives one that names none, as the defaults for groups along K do."""
    if "BLOCK_SIZE_N" in entry:
        return dict(entry)
    assert layer.block_shape is not None
    experts, rows, _ = layer.w1_shape
    tile = module.get_moe_wna16_block_config(
        config=entry,
        use_moe_wna16_cuda=False,
        num_valid_tokens=tokens * layer.top_k,
        size_k=layer.w2_shape[1],
        size_n=rows,
        num_experts=experts,
        group_size=layer.block_shape[1],
        real_top_k=layer.top_k,
        block_size_m=entry["BLOCK_SIZE_M"],
    )
    return {**entry, **tile}


def look_up(engine: VllmInstallation, module: Any, request: dict[str, Any]) -> dict[str, Any]:
    """`request` is what `lookup_probe.request_of` makes, the answer what `lookup_probe.LookupResult` is read from."""
    if request["deterministic"]:
        os.environ[bootstrap.BATCH_INVARIANT] = "1"
    if request["pretend_device"] is not None:
        bootstrap.pretend(request["pretend_device"], is_amd=request["pretend_amd"])
    heard = LogCapture(module.logger)
    layer = layer_of(request)
    taken: dict[int, Any] = {}
    for tokens in request["tokens"]:
        entry = module.try_get_optimal_moe_config(
            layer.w1_shape, layer.w2_shape, layer.top_k, layer.dtype, tokens, block_shape=request["block_shape"]
        )
        taken[tokens] = {"up": _whole(module, entry, layer, tokens), "down": None}
    return {
        "engine_version": engine.version_text,
        "triton": engine.triton,
        "device_name": module.current_platform.get_device_name(),
        "taken": taken,
        "files": heard.files,
        "log": heard.lines,
    }


if __name__ == "__main__":
    sys.exit(probe_child.answer_stdin(import_engine, lambda loaded, request: look_up(*loaded, request)))
