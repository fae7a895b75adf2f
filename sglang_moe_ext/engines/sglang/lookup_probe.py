"""Ask the real SGLang, in a fresh process and through its own lookup, which entry it takes for each M."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines import lookup_probe
from sglang_moe_ext.engines.lookup_probe import LogCapture, LookupRequest, LookupResult, ProbeModule
from sglang_moe_ext.engines.sglang import bootstrap, installation
from sglang_moe_ext.engines.sglang.installation import SglangInstallation

__all__ = ["ALONE", "AS_SERVED", "LookupRequest", "LookupResult", "SglangProbe", "ask"]

ALONE = ProbeModule("SGLang", "sglang_moe_ext.engines.sglang.lookup_probe", is_alone=True)
AS_SERVED = ProbeModule("SGLang", "sglang_moe_ext.serving.lookup_probe", is_alone=False)


class SglangProbe(lookup_probe.ProbeProcess):
    """A process of SGLang, ready to ask."""

    def __init__(self, environment: Mapping[str, str] | None = None, who: ProbeModule = ALONE) -> None:
        super().__init__(who, environment)


def ask(
    question: LookupRequest, environment: Mapping[str, str] | None = None, who: ProbeModule = ALONE
) -> LookupResult:
    """What the engine takes, asked in a process that is started for it.

    Raises:
        EngineError: the engine could not be asked, or its lookup raised.
    """
    with closing(SglangProbe(environment, who)) as probe:
        return probe.answer(question)


def _pretend(config: Any, device_name: str, smem_bytes: int) -> None:
    """Let the lookup believe in that GPU: its name, and since 0.5.14 the shared memory that one default depends on."""
    config.get_device_name = lambda *_: device_name
    config._get_cuda_shared_memory_per_block_optin = lambda: smem_bytes


def import_engine() -> tuple[SglangInstallation, Any]:
    """The engine, and its module of the table lookup; all that takes long is imported then."""
    engine = installation.find()
    if engine is None:
        raise MoEExtError("SGLang is not installed in this environment")
    config = bootstrap.import_engine(engine.config_module)
    bootstrap.publish_server_args()
    return engine, config


def look_up(engine: SglangInstallation, config: Any, request: dict[str, Any]) -> dict[str, Any]:
    """`request` and answer are described by `lookups.Question` and `lookups.Answer`."""
    bootstrap.publish_server_args(deterministic=request["deterministic"])
    if request["pretend_device"] is not None:
        _pretend(config, request["pretend_device"], request["pretend_smem"])
    heard = LogCapture(config.logger)
    layer = lookup_probe.layer_of(request)
    # 0.5.5 looks up every table as if scales were not per channel.
    asks_for_channels = "per_channel_quant" in inspect.signature(config.try_get_optimal_moe_config).parameters
    per_channel = {"per_channel_quant": layer.per_channel} if asks_for_channels else {}
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
        taken[tokens] = {"up": dict(up), "down": None if down is None else dict(down)}
    return {
        "engine_version": engine.version_text,
        "triton": engine.triton,
        "device_name": config.get_device_name(),
        "taken": taken,
        "files": heard.files,
        "log": heard.lines,
    }


def main() -> int:
    try:
        engine, config = import_engine()  # before the question comes, which may be a minute from now
        print(json.dumps(look_up(engine, config, json.load(sys.stdin))))
    except MoEExtError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
