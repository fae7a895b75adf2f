"""`sglang-moe-ext doctor`: what the engines of this environment use for a layer at each M, from which file, and why."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sglang_moe_ext.cli import console, layer_args
from sglang_moe_ext.cli.layer_args import LayerArgs
from sglang_moe_ext.core import EngineError, Gpu, GpuError, ModelError, MoEShape, TableError, TableKey
from sglang_moe_ext.engines import missing_config_log, table_names
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.engines.sglang import installation, server_info, support
from sglang_moe_ext.engines.sglang import lookup_probe as sglang_lookup_probe
from sglang_moe_ext.engines.sglang import table_names as sglang_table_names
from sglang_moe_ext.engines.sglang.installation import parse_version
from sglang_moe_ext.engines.sglang.server_info import RunningServer
from sglang_moe_ext.engines.vllm import installation as vllm_installation
from sglang_moe_ext.engines.vllm import lookup_probe as vllm_lookup_probe
from sglang_moe_ext.engines.vllm import table_names as vllm_table_names
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.models import parse_shape
from sglang_moe_ext.tables import config_table, provenance, user_store
from sglang_moe_ext.tuning.plan import DEFAULT_TOKENS


@dataclass(frozen=True, slots=True)
class LayerUnderTest:
    """A layer to look at, as that engine launches it, on a GPU that may not be here."""

    name: str
    shape: MoEShape
    gpu: Gpu
    is_here: bool
    architecture: str = ""

    @property
    def where(self) -> str:
        return "here" if self.is_here else "not here: the engine was told that it runs on it"


def named(arguments: Namespace, layer: LayerArgs) -> LayerUnderTest:
    """The layer of the flags, as SGLang has it."""
    return LayerUnderTest(layer.name, layer.shape, *layer_args.gpu_of(arguments, layer), layer.architecture)


def named_in_vllm(arguments: Namespace, layer: LayerArgs) -> LayerUnderTest | None:
    """The layer of the flags as vLLM has it, which a --shape states already; None where it has no such layer."""
    shape = layer.vllm_shape if arguments.model or arguments.from_log else layer.shape
    return None if shape is None else LayerUnderTest(layer.name, shape, *layer_args.gpu_of(arguments, layer))


def stored(engine: Literal["sglang", "vllm"]) -> Iterator[LayerUnderTest]:
    """Each layer that the user's own store has a table for."""
    here = specs.detect()
    seen: set[tuple[MoEShape, str]] = set()
    for path in user_store.all_tables(engine):
        known = provenance.read(path)
        run = None if known is None or not known.entries else next(iter(known.entries.values())).run
        try:
            key = table_names.parse(path.name)
            if run is None or key.down:
                continue
            device = missing_config_log.device_of(key)
            is_here = here is not None and here.device_name == device
            shape, gpu = parse_shape(run.shape), here if here is not None and is_here else specs.find(device)
        except (ModelError, TableError, GpuError) as error:
            print(f"{path}: passed over: {error}")
            continue
        if (shape, gpu.device_name) not in seen:
            seen.add((shape, gpu.device_name))
            yield LayerUnderTest(run.model, shape, gpu, is_here)


def examine(patient: LayerUnderTest, tokens: Sequence[int], deterministic: bool) -> Mapping[str, Any]:
    """Ask the vLLM of this environment, and print what it says.

    Raises:
        EngineError: it could not be asked.
    """
    pretend = None if patient.is_here else patient.gpu
    answer = vllm_lookup_probe.AS_SERVED.ask(LookupRequest(patient.shape, tokens, pretend, deterministic))
    print(f"{patient.name}: {patient.shape}")
    print(f"{patient.gpu.device_name} ({patient.where}), vLLM {answer.engine_version}, Triton {answer.triton}")
    print(f"sglang-moe-ext in a server of this environment: {answer.plugin}")
    print("whether the experts that vLLM chooses there read tables at all, our line in the server's log says")
    for file in answer.files:
        print(f"reads {file}")
    whys = {m: answer.whys.get(m) or _why_vllm(patient, answer, m, deterministic) for m in answer.up}
    rows = [[str(m), str(config), whys[m]] for m, config in answer.up.items()]
    columns = ["M", "configuration", "why"]
    console.show(console.Grid("what vLLM takes for both GEMMs", columns, rows, frozenset(columns[1:])))
    return {
        "engine": "vLLM",
        "model": patient.name,
        "gpu": patient.gpu.device_name,
        "plugin": answer.plugin,
        "files": [str(file) for file in answer.files],
        "findings": [{"M": m, "config": str(config), "why": whys[m]} for m, config in answer.up.items()],
    }


def _why_vllm(patient: LayerUnderTest, answer: LookupResult, tokens: int, deterministic: bool) -> str:
    """Why the engine takes what is its own choice."""
    if deterministic:
        return "the engine's default: batch invariance reads no table"
    name = vllm_table_names.file_name(vllm_table_names.table_key(patient.shape, patient.gpu.device_name))
    file = next((file for file in answer.files if file.name == name and _is_engines(file, answer)), None)
    if file is None:
        return f"the engine's default: no table {name}"
    nearest = config_table.nearest(config_table.read(file), tokens)
    entry = "its own entry" if nearest == tokens else f"nearest entry {nearest}"
    known = provenance.read(file)
    return f"{entry}; {(known and known.origin(nearest)) or 'origin unknown: shipped with the engine, or yours'}"


def _is_engines(file: Path, answer: LookupResult) -> bool:
    """Whether the engine's own lookup opened it, which says so in its log."""
    return any(str(file) in line for line in answer.log)


@dataclass(frozen=True, slots=True)
class Finding:
    """What the engine takes for one GEMM at one M, and why."""

    tokens: int
    projection: str
    config: str
    why: str


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags; the server's flags keep its names."""
    layer_args.add_to(parser)
    server = parser.add_argument_group("how the server is started")
    server.add_argument("--moe-runner-backend", default=support.AUTO, help="as the server's flag (default auto)")
    server.add_argument("--enable-deterministic-inference", action="store_true", help="as the server's flag")
    server.add_argument("--url", help="ask a running server for all of this, such as http://127.0.0.1:30000")
    server.add_argument("--api-key", help="as the server's flag, where it was started with one")


def _as_served(arguments: argparse.Namespace, server: RunningServer) -> argparse.Namespace:
    """The flags, with the server's own answers in the place of those that it answers."""
    nothing_stated = argparse.ArgumentParser()
    add_to(nothing_stated)
    stated, defaults = vars(arguments), vars(nothing_stated.parse_args([]))
    given = {name: value for name, value in stated.items() if name in defaults and value != defaults[name]}
    return argparse.Namespace(**(stated | server_info.flags(server, given)))


def _layer(arguments: argparse.Namespace, server: RunningServer | None) -> layer_args.LayerArgs:
    if server is None:
        return layer_args.parse_layer(arguments)
    try:
        layer = layer_args.parse_layer(arguments)
    except ModelError as error:
        raise ModelError(f"{server.url} serves {server.model_path}: {error}; or name it with --model") from error
    if server.quantization and arguments.dtype == "auto" and layer.shape.quantization.scheme is None:
        raise ModelError(
            f"{server.url} quantizes {layer.name} with --quantization {server.quantization}, and its checkpoint does "
            "not say to what: add --dtype, such as fp8_w8a8"
        )
    return layer


def _examined(arguments: argparse.Namespace, server: RunningServer | None) -> Iterator[Mapping[str, Any]]:
    """Of each engine that is here, the layer that the flags name, or each one in the user's store."""
    layer = _layer(arguments, server) if layer_args.names_a_layer(arguments) else None
    if installation.find() is not None:
        for patient in stored("sglang") if layer is None else [named(arguments, layer)]:
            yield _examine(patient, arguments, server)
    if server is None and vllm_installation.find() is not None:
        tokens = layer_args.tokens_of(arguments, DEFAULT_TOKENS)
        for it in stored("vllm") if layer is None else [named_in_vllm(arguments, layer)]:
            if it is not None:
                yield examine(it, tokens, arguments.enable_deterministic_inference)


def _origin(file: Path, tokens: int) -> str:
    known = provenance.read(file)
    if known is None:
        return "origin unknown: shipped with the engine, or a user's"
    return known.origin(tokens) or "origin unknown"


def _why(file: Path | None, key: TableKey, tokens: int, triton: str, deterministic: bool) -> str:
    """Why the engine takes what it takes, from the file that it opened for the key."""
    if deterministic:
        return "the engine's default: deterministic inference reads no table"
    if file is None:
        return f"the engine's default: no table {sglang_table_names.file_name(key)}"
    table = config_table.read(file)
    nearest = config_table.nearest(table, tokens)
    entry = "its own entry" if nearest == tokens else f"nearest entry {nearest}"
    folder = file.parent.name
    if folder == sglang_table_names.version_folder(triton):
        made_for = "exact Triton"
    else:
        made_for = f"other Triton ({folder.removeprefix('triton_').replace('_', '.')}), running {triton}"
    return f"{entry}; {made_for}; {_origin(file, nearest)}"


def findings(patient: LayerUnderTest, answer: LookupResult, deterministic: bool) -> list[Finding]:
    """What the answer means, for both GEMMs at each M."""
    device = patient.gpu.device_name
    files = {file.name: file for file in answer.files}
    up_key = sglang_table_names.table_key(patient.shape, device)
    down_key = sglang_table_names.table_key(patient.shape, device, down=True)
    up_file, down_file = (
        files.get(sglang_table_names.file_name(up_key)),
        files.get(sglang_table_names.file_name(down_key)),
    )
    found: list[Finding] = []
    for m, config in answer.up.items():
        ours = answer.whys.get(m)
        why = ours or _why(up_file, up_key, m, answer.triton, deterministic)
        found.append(Finding(m, "up", str(config), why))
        down = answer.down[m]
        if down is None or (down_file is None and ours is None):
            found.append(Finding(m, "down", str(down or config), "as the up projection: no table of its own"))
        else:
            why = ours or _why(down_file, down_key, m, answer.triton, deterministic)
            found.append(Finding(m, "down", str(down), why))
        if m in answer.paths:
            found.append(Finding(m, "both", answer.paths[m], "our own kernels, measured faster than those above"))
    return found


def _examine(patient: LayerUnderTest, arguments: argparse.Namespace, server: RunningServer | None) -> Mapping[str, Any]:
    tokens = layer_args.tokens_of(arguments, DEFAULT_TOKENS)
    deterministic = arguments.enable_deterministic_inference
    question = LookupRequest(patient.shape, tokens, None if patient.is_here else patient.gpu, deterministic)
    answer = sglang_lookup_probe.AS_SERVED.ask(question)
    found = findings(patient, answer, deterministic)
    print(f"{patient.name}: {patient.shape}")
    print(f"{patient.gpu.device_name} ({patient.where}), SGLang {answer.engine_version}, Triton {answer.triton}")
    warning = support.why_no_table(
        arguments.moe_runner_backend,
        patient.shape,
        patient.gpu,
        patient.architecture,
        parse_version(answer.engine_version),
    )
    warning = (server and server_info.why_no_table(server)) or warning
    if warning:
        print(f"NO TABLE IS READ, whatever follows: {warning}")
    print(f"sglang-moe-ext in a server of this environment: {answer.plugin}")
    for file in answer.files:
        print(f"reads {file}")
    rows = [[str(one.tokens), one.projection, one.config, one.why] for one in found]
    columns = ["M", "GEMM", "configuration", "why"]
    console.show(console.Grid("what the engine takes", columns, rows, frozenset(columns[1:])))
    return {
        "engine": "SGLang",
        "model": patient.name,
        "gpu": patient.gpu.device_name,
        "reads_tables": warning is None and not deterministic,
        "plugin": answer.plugin,
        "files": [str(file) for file in answer.files],
        "findings": [{"M": one.tokens, "gemm": one.projection, "config": one.config, "why": one.why} for one in found],
    }


def run(arguments: argparse.Namespace) -> None:
    """Examine what the flags name; the last line printed is JSON.

    Raises:
        MoEExtError: there is no engine to ask, or the flags make no sense.
    """
    engine = installation.find()
    if engine is None and (arguments.url is not None or vllm_installation.find() is None):
        raise EngineError(
            f"{'no SGLang' if arguments.url else 'neither SGLang nor vLLM'} is installed in this environment: "
            "there is nothing to ask; run doctor where it is"
        )
    server = None if arguments.url is None else server_info.ask(arguments.url, arguments.api_key)
    if server is not None and engine is not None:
        arguments = _as_served(arguments, server)
        print(*server_info.report(server, engine.version_text), sep="\n")
    examined = list(_examined(arguments, server))
    if not examined:
        print(f"no table of ours in {user_store.root()}: name a layer with --model, or tune one")
    about = {} if server is None else {"server": {"url": server.url, "version": server.version_text}}
    print(json.dumps({"examined": examined} | about))
