"""Ask a real engine, in a fresh process and through its own lookup, which entry it takes for each M."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError, Gpu, MoEShape, TileConfig
from sglang_moe_ext.engines import lookup_args
from sglang_moe_ext.engines.config_dict import tile_of
from sglang_moe_ext.engines.lookup_args import LookupLayer

TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class LookupRequest:
    """What one layer asks. `pretend`: the GPU that the engine shall believe in where it is not here.

    `deterministic`: in a server that promises the same result whatever the batch.
    """

    shape: MoEShape
    tokens: Sequence[int]
    pretend: Gpu | None = None
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class LookupResult:
    """What the engine takes for each M, the files it opened for that, and what it said.

    `down` is None where the down projection runs the entry of `up`, as it always does in vLLM. Of an engine that was
    asked AS_SERVED, `plugin` says what became of our hooks, `whys` at which M they decided, and `paths` where our own
    kernels run in place of the engine's, which all else is about.
    """

    engine_version: str
    triton: str
    device_name: str
    up: dict[int, TileConfig]
    down: dict[int, TileConfig | None]
    files: tuple[Path, ...]
    log: tuple[str, ...]
    plugin: str | None = None
    whys: Mapping[int, str] = field(default_factory=dict)
    paths: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ProbeModule:
    """The module that asks an engine: alone, or with our hooks as a server has them."""

    engine: str
    module: str
    is_alone: bool


def request_of(question: LookupRequest) -> dict[str, Any]:
    """The question as the child reads it."""
    shape, pretend = question.shape, question.pretend
    packed = shape.quantization.row.weights_per_element
    block = shape.quantization.block_shape
    return {
        "experts": shape.experts,
        "intermediate_size": shape.intermediate_size // packed,
        "hidden_size": shape.hidden_size,
        "up_rows": shape.gemm("up")[0],
        "top_k": shape.top_k,
        "scheme": shape.quantization.scheme,
        "block_shape": None if block is None else list(block),
        "per_channel": shape.quantization.per_channel,
        "tokens": list(question.tokens),
        "deterministic": question.deterministic,
        "pretend_device": None if pretend is None else pretend.device_name,
        "pretend_smem": None if pretend is None else pretend.smem_per_block,
    }


def layer_of(request: Mapping[str, Any]) -> LookupLayer:
    """The layer that a request is about."""
    experts, hidden_size = request["experts"], request["hidden_size"]
    w1_shape, w2_shape = (
        (experts, request["up_rows"], hidden_size),
        (experts, hidden_size, request["intermediate_size"]),
    )
    scales = request["block_shape"], request["per_channel"]
    return lookup_args.lookup_layer(w1_shape, w2_shape, request["top_k"], request["scheme"], *scales)


class ProbeProcess:
    """A process that has the engine imported, or soon will, and has looked nothing up: a fresh engine, ready to ask.

    The import takes ten seconds and more; started early, it costs nothing where there is other work to do meanwhile.
    """

    def __init__(self, who: ProbeModule, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: of the process (SGLANG_MOE_CONFIG_DIR, PYTHONPATH), by default our own."""
        self._engine = who.engine
        theirs = dict(os.environ if environment is None else environment)
        # Files, not pipes, which an engine that says much while it is imported would fill before anybody reads them.
        self._said, self._complaints = (tempfile.TemporaryFile("w+", errors="replace") for _ in range(2))  # noqa: SIM115 - close() does
        self._child = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", who.module],
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=self._complaints,
            text=True,
            env=theirs | {env.DISABLE: "1"} if who.is_alone else theirs,
        )

    def answer(self, question: LookupRequest) -> LookupResult:
        """What the engine takes, read from its tables now. A process answers once.

        Raises:
            EngineError: the engine could not be asked, or its lookup raised.
        """
        try:
            self._child.communicate(json.dumps(request_of(question)), timeout=TIMEOUT_S)
            said, complaints = _read(self._said), _read(self._complaints)
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"{self._engine} did not answer which table it takes within {TIMEOUT_S:.0f} s") from error
        finally:
            self.close()
        if self._child.returncode != 0:
            reason = complaints.strip().splitlines() or [f"exit status {self._child.returncode}"]
            raise EngineError(f"{self._engine}'s own table lookup failed: {reason[-1]}")
        try:
            return _answer(json.loads(said.strip().splitlines()[-1]))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EngineError(
                f"{self._engine} takes an entry that is no configuration: {type(error).__name__} {error}"
            ) from error

    def close(self) -> None:
        """End the process, asked or not."""
        self._child.kill()
        self._child.communicate()
        self._said.close()
        self._complaints.close()


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _answer(said: Mapping[str, Any]) -> LookupResult:
    return LookupResult(
        engine_version=said["engine_version"],
        triton=said["triton"],
        device_name=said["device_name"],
        up={int(m): tile_of(taken["up"]) for m, taken in said["taken"].items()},
        down={int(m): None if taken["down"] is None else tile_of(taken["down"]) for m, taken in said["taken"].items()},
        files=tuple(Path(file) for file in said["files"]),
        log=tuple(said["log"]),
        plugin=said.get("plugin"),
        whys={int(m): str(why) for m, why in said.get("whys", {}).items()},
        paths={int(m): str(path) for m, path in said.get("paths", {}).items()},
    )


class LogCapture(logging.Handler):
    """The lines that a logger gets from now on, and the JSON files that the process opens, whatever is said of them."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self._opened: list[str] = []
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        sys.addaudithook(self._note)

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(self._opened))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(".json"):
            self._opened.append(str(arguments[0]))
