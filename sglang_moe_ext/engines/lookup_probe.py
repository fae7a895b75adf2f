"""Ask a real engine, in a fresh process and through its own lookup, which entry it takes for each M."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError, Gpu, MoEShape, Projection, TileConfig
from sglang_moe_ext.engines import checkpoint_section, lookup_args, probe_server
from sglang_moe_ext.engines.backend_answer import AskedBackend
from sglang_moe_ext.engines.config_dict import tile_of
from sglang_moe_ext.engines.lookup_args import LookupLayer
from sglang_moe_ext.engines.weight_only import is_weight_only
from sglang_moe_ext.untrusted import show

TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class LookupRequest:
    """What one layer asks. `pretend`: the GPU that the engine shall believe in where it is not here.

    `deterministic`: in a server that promises the same result whatever the batch. `backend_flag`: the server's flag
    that names the MoE backend, by which a model of that `architecture` is asked for its backend too; None: it is not.
    """

    shape: MoEShape
    tokens: Sequence[int]
    pretend: Gpu | None = None
    deterministic: bool = False
    backend_flag: str | None = None
    architecture: str = ""


Written = Mapping[str, Any]
"""An entry as a table has it, before anything is made of it; its values may be anything."""


@dataclass(frozen=True, slots=True)
class LookupResult:
    """What the engine takes for each M, the files it opened for that, and what it said.

    `down` is None if the down projection runs the entry of `up`, as it always does in vLLM unless the guard changes it.
    `is_from_files`: the engine's own lookup was run from its files, without the rest of the engine. `backend` is None
    if the engine was not asked for it, or could not say.

    An engine that was asked AS_SERVED says more:

    - `plugin`: the state of our hooks;
    - `whys`: at which M they decided, and why;
    - `paths`: the kernel plan that runs in place of the engine's kernels, which all else is about;
    - `written`, `fitted`: where an entry was changed before its launch, by M and projection, the entry as it was
      written and why another one runs;
    - `alone`: the up entry that the engine's own lookup takes without our hooks, or in `alone_errors` what it raises;
    - `remarks`: what is odd about the files and variables that the lookup depends on.
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
    written: Mapping[int, Mapping[Projection, Written]] = field(default_factory=dict)
    fitted: Mapping[int, Mapping[Projection, str]] = field(default_factory=dict)
    alone: Mapping[int, Written] = field(default_factory=dict)
    alone_errors: Mapping[int, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    is_from_files: bool = False
    backend: AskedBackend | None = None


@dataclass(frozen=True, slots=True)
class ProbeModule:
    """The child process that asks an engine: `python -m MODULE ARGUMENTS`.

    `is_alone`: without our hooks; else with them, as a server has them.
    """

    engine: str
    module: str
    arguments: tuple[str, ...]
    is_alone: bool

    def start(self, environment: Mapping[str, str] | None = None) -> ProbeProcess:
        """A process that is ready to be asked, under that environment or our own."""
        return ProbeProcess(self, environment)

    def ask(self, request: LookupRequest, environment: Mapping[str, str] | None = None) -> LookupResult:
        """What the engine takes, asked in a process that is started for it.

        Raises:
            EngineError: the engine could not be asked, or its lookup raised.
        """
        with closing(self.start(environment)) as probe:
            return probe.answer(request)


def engine_alone(engine: str, module: str) -> ProbeModule:
    """The probe of an engine without our hooks."""
    return ProbeModule(engine, module, (), is_alone=True)


def engine_as_served(engine: str, name: str) -> ProbeModule:
    """The probe of an engine with our hooks."""
    return ProbeModule(engine, "sglang_moe_ext.serving.hooked_lookup", (name,), is_alone=False)


FROM_FILES = "from-files"


def engine_from_files(engine: str, name: str) -> ProbeModule:
    """The probe of an engine's own lookup, run from its files without the rest of it, with our hooks.

    It answers within a second. The GPU has to be pretended, and the server must not be deterministic.
    """
    return ProbeModule(engine, "sglang_moe_ext.serving.hooked_lookup", (name, FROM_FILES), is_alone=False)


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
        "pretend_amd": pretend is not None and pretend.target.is_amd,
        "backend": _backend_request(question),
    }


def _backend_request(question: LookupRequest) -> dict[str, Any] | None:
    """What decides on the backend; None where the engine is not asked, or the checkpoint may say more than is known."""
    shape = question.shape
    stated = checkpoint_section.describe(shape.quantization)
    if question.backend_flag is None or stated is None:
        return None
    if question.pretend is not None and question.pretend.target.is_amd:
        return None  # the engines choose there by compiled packages, which can be asked on the GPU itself alone
    section, flag = stated
    return {
        "flag": question.backend_flag,
        "architecture": question.architecture,
        "quantization": flag,
        "section": section,
        "weight_only": is_weight_only(shape.quantization),
        "experts": shape.experts,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "top_k": shape.top_k,
        "gated": shape.gated,
        "dtype": shape.dtype,
        "ep": shape.ep,
        "sm": None if question.pretend is None else question.pretend.sm,
        "device": None if question.pretend is None else question.pretend.device_name,
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
    """A process that has the engine imported, or soon will, and answers each request in a fresh fork of itself.

    The import takes ten seconds and more; started early, it costs nothing where there is other work to do meanwhile.
    """

    def __init__(self, who: ProbeModule, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: of the process (SGLANG_MOE_CONFIG_DIR, PYTHONPATH), by default our own."""
        self._engine, self._who = who.engine, who
        theirs = {**(os.environ if environment is None else environment), env.HUB_OFFLINE: "1"}  # none needs the hub
        self._environment = theirs | {env.DISABLE: "1"} if who.is_alone else theirs
        self._open = contextlib.ExitStack()
        self._start()

    def _start(self) -> None:
        # Files, not pipes, which an engine that says much while it is imported would fill before they are read.
        self._said, self._complaints = (tempfile.TemporaryFile("w+", errors="replace") for _ in range(2))  # noqa: SIM115 - close() does
        for file in (self._said, self._complaints):
            self._open.enter_context(file)
        self._told, telling = os.pipe()
        self._open.callback(os.close, self._told)
        try:
            self._child = subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    "-m",
                    probe_server.__name__,
                    self._who.module,
                    str(os.getpid()),
                    str(telling),
                    *self._who.arguments,
                ],
                stdin=subprocess.PIPE,
                stdout=self._said,
                stderr=self._complaints,
                text=True,
                env=self._environment,
                pass_fds=[telling],
                start_new_session=True,  # one signal ends it and its forks; Ctrl-C is the parent's to handle
            )
        finally:
            os.close(telling)
        self._open.callback(self._end)

    def answer(self, question: LookupRequest) -> LookupResult:
        """What the engine takes, read from its tables now.

        Raises:
            EngineError: the engine could not be asked, or its lookup raised.
        """
        if self._child.poll() is not None:  # it could not fork: it answers once
            self.close()
            self._start()
        said_before = self._said.seek(0, os.SEEK_END)
        exit_code = self._exchange(json.dumps(request_of(question)))
        said, complaints = _read(self._said, said_before), _read(self._complaints, 0)
        if exit_code != 0:
            reason = complaints.strip().splitlines() or [f"exit status {exit_code}"]
            self.close()
            raise EngineError(f"{self._engine}'s own table lookup failed: {show(reason[-1], 400)}")
        try:
            return _answer(json.loads(said.strip().splitlines()[-1]))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EngineError(
                f"{self._engine} takes an entry that is no configuration: {type(error).__name__} {show(error)}"
            ) from error

    def _exchange(self, request: str) -> int:
        """The exit code of the fork that answers, or of the process itself."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended with its import: its exit code says so
            self._child.stdin.write(f"{request}\n")
            self._child.stdin.flush()
        if not select.select([self._told], [], [], TIMEOUT_S)[0]:
            self.close()
            raise EngineError(f"{self._engine} did not answer which table it takes within {TIMEOUT_S:.0f} s")
        told = os.read(self._told, 64)
        return int(told) if told else self._child.wait()

    def close(self) -> None:
        """End the process, asked or not."""
        self._open.close()

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.communicate()


def _read(file: IO[str], start: int) -> str:
    file.seek(start)
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
        written={int(m): dict(entries) for m, entries in said.get("written", {}).items()},
        fitted={int(m): dict(entries) for m, entries in said.get("fitted", {}).items()},
        alone={int(m): dict(entry) for m, entry in said.get("alone", {}).items()},
        alone_errors={int(m): str(error) for m, error in said.get("alone_errors", {}).items()},
        remarks=tuple(map(str, said.get("remarks", ()))),
        is_from_files=bool(said.get("is_from_files")),
        backend=AskedBackend(**said["backend"]) if said.get("backend") else None,
    )
