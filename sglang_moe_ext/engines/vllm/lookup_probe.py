"""Ask the real vLLM, in a fresh process and through its own lookup, which entry it takes for each M."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines import lookup_probe
from sglang_moe_ext.engines.lookup_args import LookupLayer
from sglang_moe_ext.engines.lookup_probe import LogCapture, LookupRequest, LookupResult, ProbeModule
from sglang_moe_ext.engines.vllm import bootstrap, installation, table_names
from sglang_moe_ext.engines.vllm.installation import LAYER_MODULE, VllmInstallation

__all__ = ["ALONE", "AS_SERVED", "LookupRequest", "LookupResult", "VllmProbe", "ask"]

ALONE = ProbeModule("vLLM", "sglang_moe_ext.engines.vllm.lookup_probe", is_alone=True)
AS_SERVED = ProbeModule("vLLM", "sglang_moe_ext.serving.vllm_lookup_probe", is_alone=False)


class VllmProbe(lookup_probe.ProbeProcess):
    """A process of vLLM, ready to ask."""

    def __init__(self, environment: Mapping[str, str] | None = None, who: ProbeModule = ALONE) -> None:
        super().__init__(who, environment)


def ask(
    question: LookupRequest, environment: Mapping[str, str] | None = None, who: ProbeModule = ALONE
) -> LookupResult:
    """What the engine takes, asked in a process that is started for it.

    Raises:
        EngineError: the engine could not be asked, or its lookup raised.
    """
    with closing(VllmProbe(environment, who)) as probe:
        return probe.answer(question)


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
    """`request` and answer are described by `lookups.Question` and `lookups.Answer`."""
    if request["deterministic"]:
        os.environ[bootstrap.BATCH_INVARIANT] = "1"
    if request["pretend_device"] is not None:
        bootstrap.pretend(request["pretend_device"])
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


def main() -> int:
    try:
        engine, module = import_engine()  # before the question comes, which may be a minute from now
        print(json.dumps(look_up(engine, module, json.load(sys.stdin))))
    except MoEExtError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
