"""`sglang-moe-ext doctor`: what the engines of this environment use for a layer at each M, from which file, and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_moe_ext import doctor_vllm, layer_arguments, layer_flags, patients, terminal
from sglang_moe_ext.core import EngineError, ModelError, TableKey
from sglang_moe_ext.engines.sglang import backends, installation, lookup, naming, running_server
from sglang_moe_ext.engines.sglang.running_server import RunningServer
from sglang_moe_ext.engines.vllm import installation as vllm_installation
from sglang_moe_ext.patients import Patient
from sglang_moe_ext.store import provenance, tables, user_store
from sglang_moe_ext.tuning.plan import DEFAULT_TOKENS


@dataclass(frozen=True, slots=True)
class Finding:
    """What the engine takes for one GEMM at one M, and why."""

    tokens: int
    projection: str
    config: str
    why: str


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags; the server's flags keep its names."""
    layer_flags.add_to(parser)
    server = parser.add_argument_group("how the server is started")
    server.add_argument("--moe-runner-backend", default=backends.AUTO, help="as the server's flag (default auto)")
    server.add_argument("--enable-deterministic-inference", action="store_true", help="as the server's flag")
    server.add_argument("--url", help="ask a running server for all of this, such as http://127.0.0.1:30000")
    server.add_argument("--api-key", help="as the server's flag, where it was started with one")


def _as_served(arguments: argparse.Namespace, server: RunningServer) -> argparse.Namespace:
    """The flags, with the server's own answers in the place of those that it answers."""
    nothing_stated = argparse.ArgumentParser()
    add_to(nothing_stated)
    stated, defaults = vars(arguments), vars(nothing_stated.parse_args([]))
    given = {name: value for name, value in stated.items() if name in defaults and value != defaults[name]}
    return argparse.Namespace(**(stated | running_server.flags(server, given)))


def _layer(arguments: argparse.Namespace, server: RunningServer | None) -> layer_arguments.Stated:
    if server is None:
        return layer_arguments.stated(arguments)
    try:
        layer = layer_arguments.stated(arguments)
    except ModelError as error:
        raise ModelError(f"{server.url} serves {server.model_path}: {error}; or name it with --model") from error
    if server.quantization and arguments.dtype == "auto" and layer.shape.quantisation.scheme is None:
        raise ModelError(
            f"{server.url} quantises {layer.name} with --quantization {server.quantization}, and its checkpoint does "
            "not say to what: add --dtype, such as fp8_w8a8"
        )
    return layer


def _examined(arguments: argparse.Namespace, server: RunningServer | None) -> Iterator[Mapping[str, Any]]:
    """Of each engine that is here, the layer that the flags name, or each one in the user's store."""
    layer = _layer(arguments, server) if layer_arguments.is_given(arguments) else None
    if installation.find() is not None:
        for patient in patients.stored("sglang") if layer is None else [patients.named(arguments, layer)]:
            yield _examine(patient, arguments, server)
    if server is None and vllm_installation.find() is not None:
        tokens = layer_arguments.tokens_of(arguments, DEFAULT_TOKENS)
        for it in patients.stored("vllm") if layer is None else [patients.named_in_vllm(arguments, layer)]:
            if it is not None:
                yield doctor_vllm.examine(it, tokens, arguments.enable_deterministic_inference)


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
        return f"the engine's default: no table {naming.file_name(key)}"
    table = tables.read(file)
    nearest = tables.nearest(table, tokens)
    entry = "its own entry" if nearest == tokens else f"nearest entry {nearest}"
    folder = file.parent.name
    if folder == naming.version_folder(triton):
        made_for = "exact Triton"
    else:
        made_for = f"other Triton ({folder.removeprefix('triton_').replace('_', '.')}), running {triton}"
    return f"{entry}; {made_for}; {_origin(file, nearest)}"


def findings(patient: Patient, answer: lookup.Answer, deterministic: bool) -> list[Finding]:
    """What the answer means, for both GEMMs at each M."""
    device = patient.gpu.device_name
    files = {file.name: file for file in answer.files}
    up_key = naming.table_key(patient.shape, device)
    down_key = naming.table_key(patient.shape, device, down=True)
    up_file, down_file = files.get(naming.file_name(up_key)), files.get(naming.file_name(down_key))
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


def _examine(patient: Patient, arguments: argparse.Namespace, server: RunningServer | None) -> Mapping[str, Any]:
    tokens = layer_arguments.tokens_of(arguments, DEFAULT_TOKENS)
    deterministic = arguments.enable_deterministic_inference
    question = lookup.Question(patient.shape, tokens, None if patient.is_here else patient.gpu, deterministic)
    answer = lookup.ask(question, who=lookup.AS_SERVED)
    found = findings(patient, answer, deterministic)
    print(f"{patient.name}: {patient.shape}")
    print(f"{patient.gpu.device_name} ({patient.where}), SGLang {answer.engine_version}, Triton {answer.triton}")
    warning = backends.why_no_table(arguments.moe_runner_backend, patient.shape, patient.gpu, patient.architecture)
    warning = (server and running_server.why_no_table(server)) or warning
    if warning:
        print(f"NO TABLE IS READ, whatever follows: {warning}")
    print(f"sglang-moe-ext in a server of this environment: {answer.plugin}")
    for file in answer.files:
        print(f"reads {file}")
    rows = [[str(one.tokens), one.projection, one.config, one.why] for one in found]
    columns = ["M", "GEMM", "configuration", "why"]
    terminal.show(terminal.Grid("what the engine takes", columns, rows, frozenset(columns[1:])))
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
    server = None if arguments.url is None else running_server.ask(arguments.url, arguments.api_key)
    if server is not None and engine is not None:
        arguments = _as_served(arguments, server)
        print(*running_server.report(server, engine.version_text), sep="\n")
    examined = list(_examined(arguments, server))
    if not examined:
        print(f"no table of ours in {user_store.root()}: name a layer with --model, or tune one")
    about = {} if server is None else {"server": {"url": server.url, "version": server.version_text}}
    print(json.dumps({"examined": examined} | about))
