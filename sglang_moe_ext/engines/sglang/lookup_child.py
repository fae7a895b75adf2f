"""The child of `lookup`: asks the real engine's `try_get_optimal_moe_config`, prints the answers as JSON."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from typing import Any

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines.sglang import asked, bootstrap, installation
from sglang_moe_ext.engines.sglang.asked import Layer
from sglang_moe_ext.engines.sglang.installation import Installation


class _Remembers(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _watch_opened_tables(opened: list[str]) -> None:
    """Note each JSON file that the process opens from now on, whatever the engine says of it in its log."""

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(".json"):
            opened.append(str(arguments[0]))

    sys.addaudithook(note)


def _pretend(config: Any, device_name: str, smem_bytes: int) -> None:
    """Let the lookup believe in that GPU: its name, and since 0.5.14 the shared memory that one default depends on."""
    config.get_device_name = lambda *_: device_name
    config._get_cuda_shared_memory_per_block_optin = lambda: smem_bytes


def imported() -> tuple[Installation, Any]:
    """The engine, and its module of the table lookup; all that takes long is imported then."""
    engine = installation.find()
    if engine is None:
        raise MoEExtError("SGLang is not installed in this environment")
    config = bootstrap.import_engine(engine.config_module)
    bootstrap.publish_server_args()
    return engine, config


def layer_of(request: dict[str, Any]) -> Layer:
    """The layer that a request is about."""
    experts, hidden_size = request["experts"], request["hidden_size"]
    w1_shape, w2_shape = (
        (experts, request["up_rows"], hidden_size),
        (experts, hidden_size, request["intermediate_size"]),
    )
    scales = request["block_shape"], request["per_channel"]
    return asked.layer_of(w1_shape, w2_shape, request["top_k"], request["scheme"], *scales)


def answer(engine: Installation, config: Any, request: dict[str, Any]) -> dict[str, Any]:
    """`request` and answer are described by `lookup.Question` and `lookup.Answer`."""
    bootstrap.publish_server_args(deterministic=request["deterministic"])
    if request["pretend_device"] is not None:
        _pretend(config, request["pretend_device"], request["pretend_smem"])
    log = _Remembers()
    config.logger.setLevel(logging.INFO)
    config.logger.addHandler(log)
    opened: list[str] = []
    _watch_opened_tables(opened)
    layer = layer_of(request)
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
        "files": list(dict.fromkeys(opened)),
        "log": log.lines,
    }


def main() -> int:
    try:
        engine, config = imported()  # before the question comes, which may be a minute from now
        print(json.dumps(answer(engine, config, json.load(sys.stdin))))
    except MoEExtError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
