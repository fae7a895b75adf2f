"""Ask the real SGLang, in a fresh process and through its own lookup, which entry it takes for each M."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines import lookup_probe, probe_child
from sglang_moe_ext.engines.config_dict import TRITON_STAGES_ON_AMD
from sglang_moe_ext.engines.probe_child import LogCapture
from sglang_moe_ext.engines.sglang import bootstrap, installation
from sglang_moe_ext.engines.sglang.installation import SglangInstallation

ALONE = lookup_probe.engine_alone("SGLang", "sglang_moe_ext.engines.sglang.lookup_probe")
AS_SERVED = lookup_probe.engine_as_served("SGLang", "sglang")
FROM_FILES = lookup_probe.engine_from_files("SGLang", "sglang")


def _pretend(config: Any, request: dict[str, Any]) -> None:
    """Let the lookup believe in that GPU: its name, whose it is, and since 0.5.14 its shared memory.

    One default depends on that memory; AMD's GPUs have none by that name, and default configurations of their own.
    """
    device_name, is_amd = request["pretend_device"], request["pretend_amd"]
    smem_bytes = None if is_amd else request["pretend_smem"]
    config.get_device_name = lambda *_: device_name
    config._get_cuda_shared_memory_per_block_optin = lambda: smem_bytes
    config._is_hip = is_amd


def import_engine() -> tuple[SglangInstallation, Any]:
    """The engine, and its module of the table lookup; all that takes long is imported then."""
    engine = installation.find()
    if engine is None:
        raise MoEExtError("SGLang is not installed in this environment")
    config = bootstrap.import_engine(engine.config_module)
    bootstrap.publish_server_args()
    return engine, config


def look_up(engine: SglangInstallation, config: Any, request: dict[str, Any]) -> dict[str, Any]:
    """`request` is what `lookup_probe.request_of` makes, the answer what `lookup_probe.LookupResult` is read from."""
    bootstrap.publish_server_args(deterministic=request["deterministic"])
    return take(engine, config, request)


def take(engine: SglangInstallation, config: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The same, where the lookup knows the server's arguments already."""
    if request["pretend_device"] is not None:
        _pretend(config, request)
    heard = LogCapture(config.logger)
    layer = lookup_probe.layer_of(request)
    # 0.5.5 looks up every table as if scales were not per channel.
    asks_for_channels = "per_channel_quant" in inspect.signature(config.try_get_optimal_moe_config).parameters
    per_channel = {"per_channel_quant": layer.per_channel} if asks_for_channels else {}
    # What Triton takes where the engine's default names no stages.
    stages = {"num_stages": TRITON_STAGES_ON_AMD} if config._is_hip else {}
    taken: dict[int, Any] = {}
    for tokens in request["tokens"]:
        up, (down, _) = config.try_get_optimal_moe_config(
            layer.w1_shape,
            layer.w2_shape,
            layer.top_k,
            layer.dtype,
            tokens,
            block_shape=request["block_shape"],
            return_down_config=True,
            **per_channel,
        )
        taken[tokens] = {"up": stages | dict(up), "down": None if down is None else stages | dict(down)}
    return {
        "engine_version": engine.version_text,
        "triton": engine.triton,
        "device_name": config.get_device_name(),
        "taken": taken,
        "files": heard.files,
        "log": heard.lines,
    }


if __name__ == "__main__":
    sys.exit(probe_child.answer_stdin(import_engine, lambda loaded, request: look_up(*loaded, request)))
