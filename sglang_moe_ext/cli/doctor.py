"""`sglang-moe-ext doctor`: which configurations the engines of this environment take for a layer, and why."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sglang_moe_ext.cli import (
    doctor_layers,
    doctor_report,
    doctor_sglang,
    doctor_vllm,
    gpu_args,
    layer_args,
    layer_flags,
)
from sglang_moe_ext.cli.command import Command
from sglang_moe_ext.cli.doctor_examination import Examination
from sglang_moe_ext.cli.doctor_layers import LayerUnderTest
from sglang_moe_ext.core import EngineError, ModelError
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.registry import SGLANG
from sglang_moe_ext.engines.sglang import installation, server_info, support
from sglang_moe_ext.engines.sglang.server_info import RunningServer
from sglang_moe_ext.engines.vllm import installation as vllm_installation
from sglang_moe_ext.tables import user_store
from sglang_moe_ext.tuning.tune_plan import DEFAULT_TOKENS


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags; the server's flags keep its names."""
    layer_flags.add_to(parser)
    server = parser.add_argument_group("how the server is started")
    server.add_argument("--engine", choices=("sglang", "vllm"), help="engine to ask (default: each one installed here)")
    server.add_argument(
        "--moe-runner-backend", default=support.AUTO, help="SGLang server's flag of that name (default auto)"
    )
    server.add_argument(
        "--enable-deterministic-inference", action="store_true", help="SGLang server's flag of that name"
    )
    server.add_argument("--url", help="address of a running SGLang server to ask, such as http://127.0.0.1:30000")
    server.add_argument("--api-key", help="API key of that server, if it was started with one")


def _as_served(arguments: argparse.Namespace, server: RunningServer) -> argparse.Namespace:
    """The flags, with the server's own answers in the place of those that it answers."""
    nothing_stated = argparse.ArgumentParser()
    add_to(nothing_stated)
    stated, defaults = vars(arguments), vars(nothing_stated.parse_args([]))
    given = {name: value for name, value in stated.items() if name in defaults and value != defaults[name]}
    return argparse.Namespace(**(stated | server_info.flags(server, given)))


def _layer(arguments: argparse.Namespace, server: RunningServer | None) -> layer_args.LayerArgs:
    """The layer for both engines; of a pasted line the engine that wrote it is the one that is asked."""
    flags = argparse.Namespace(**vars(arguments))
    if not arguments.from_log:
        flags.engine = arguments.engine or SGLANG.NAME  # where both are asked, SGLang's split is the one refused
    if server is None:
        layer = layer_args.parse_layer(flags)
        if arguments.from_log:
            arguments.engine = flags.engine
            _check_engine(arguments)
        return layer
    try:
        return layer_args.parse_layer(flags)
    except ModelError as error:
        raise ModelError(f"{server.url} serves {server.model_path}: {error}; or name it with --model") from error


def examine(arguments: argparse.Namespace, server: RunningServer | None) -> Iterator[Examination]:
    """In each engine that is asked: the layer that the flags name, or each layer in the user's store.

    Raises:
        MoEExtError: the flags name no layer, or an engine could not be asked.
    """
    layer = _layer(arguments, server) if layer_args.names_a_layer(arguments) else None
    tokens = gpu_args.tokens_of(arguments, DEFAULT_TOKENS)
    deterministic = arguments.enable_deterministic_inference
    if arguments.engine != "vllm" and installation.find() is not None:
        for one in _layers(arguments, layer, "sglang"):
            found = doctor_sglang.examine(one, tokens, arguments.moe_runner_backend, deterministic=deterministic)
            by_server = None if server is None else server_info.why_no_table(server)
            yield replace(found, no_table=by_server or found.no_table)
    if arguments.engine != "sglang" and server is None and vllm_installation.find() is not None:
        for one in _layers(arguments, layer, "vllm"):
            yield doctor_vllm.examine(one, tokens, deterministic=deterministic)


def _layers(
    arguments: argparse.Namespace, layer: layer_args.LayerArgs | None, engine: EngineName
) -> Iterator[LayerUnderTest]:
    if layer is None:
        yield from doctor_layers.from_store(engine)
    elif (found := doctor_layers.from_flags(arguments, layer, engine)) is not None:
        yield found


def _check_engine(arguments: argparse.Namespace) -> None:
    """Raises EngineError where no engine that the flags want is installed here."""
    is_here = {"sglang": installation.find() is not None, "vllm": vllm_installation.find() is not None}
    wanted = "sglang" if arguments.url is not None else arguments.engine
    if wanted is None and not any(is_here.values()):
        raise EngineError(
            "neither SGLang nor vLLM is installed in this environment: there is nothing to ask; run doctor where it is"
        )
    if wanted is not None and not is_here[wanted]:
        title = {"sglang": "SGLang", "vllm": "vLLM"}[wanted]
        raise EngineError(
            f"no {title} is installed in this environment: there is nothing to ask; run doctor where it is"
        )


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Examine what the flags name, and give the document of what was found.

    Raises:
        MoEExtError: there is no engine to ask, or the flags make no sense.
    """
    _check_engine(arguments)
    engine = installation.find()
    server = None if arguments.url is None else server_info.ask(arguments.url, arguments.api_key)
    if server is not None and engine is not None:
        arguments = _as_served(arguments, server)
        print(*server_info.report(server, engine.version_text), sep="\n")
    if not layer_args.names_a_layer(arguments):
        print(f"no layer is named: examining each layer that {user_store.root()} has a table for")
    examined = []
    for found in examine(arguments, server):
        doctor_report.show(found)
        examined.append(doctor_report.document(found))
    if not examined:
        print(f"no table of ours in {user_store.root()}: name a layer with --model, or tune one")
    about = {} if server is None else {"server": {"url": server.url, "version": server.version_text}}
    return {"examined": examined} | about


COMMAND = Command(
    name="doctor",
    summary="print which configuration a server takes at each batch size, from which table, and why",
    description=(
        "Ask the SGLang or vLLM of this environment which configuration a server takes for a layer at each number of\n"
        "tokens, from which table, and why. Without a layer, each layer that your store has a table for is examined."
    ),
    examples=(
        ("sglang-moe-ext doctor --model GLM-4.7-Flash", "on the GPU of this machine"),
        ("sglang-moe-ext doctor --model GLM-4.7-Flash --gpu H200 --batch-size 1 64 4096", "on another GPU"),
        ("sglang-moe-ext doctor --url http://127.0.0.1:30000", "for the model that a running SGLang server has"),
        ("sglang-moe-ext doctor --json", "for programs: every layer of your store, as one JSON document"),
    ),
    add_to=add_to,
    run=run,
)
