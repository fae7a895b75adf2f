"""`sglang-moe-ext capture`: ask a running server which experts its prompts take, and store that for `tune`."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sglang_moe_ext.cli import console
from sglang_moe_ext.cli.command import Command
from sglang_moe_ext.core import EngineError, ModelError, MoEExtError, MoEModel
from sglang_moe_ext.engines.sglang import server_info, server_routing
from sglang_moe_ext.engines.sglang.server_client import LONGEST_S, Server
from sglang_moe_ext.models import resolve
from sglang_moe_ext.serving import capture
from sglang_moe_ext.serving.capture import RoutingTable
from sglang_moe_ext.untrusted import read_regular_file, show

FEW_ROWS = 16_384
"""The largest batch that is tuned by default; fewer rows repeat in it."""
MOST_PROMPT_BYTES = 64 << 20


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--url", required=True, help="the server's address, such as http://127.0.0.1:30000")
    parser.add_argument(
        "--prompts", required=True, type=Path, metavar="FILE", help="a prompt a line, or JSON with a text or a prompt"
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("topk_ids"),
        metavar="DIR",
        help="for one file a layer (default topk_ids)",
    )
    parser.add_argument("--max-tokens", type=int, default=16, help="to generate for each prompt (default 16)")
    parser.add_argument(
        "--model", help="a built-in name, a folder with config.json, or a hub id (default: the server's)"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model's folder brings (default: never)"
    )
    parser.add_argument("--api-key", help="as the server's flag of that name")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for each prompt (default 600)")


def prompts(file: Path) -> list[str]:
    """One from each line that is not empty.

    Raises:
        MoEExtError: the file cannot be read, or has none.
    """
    try:
        lines = read_regular_file(file, MOST_PROMPT_BYTES).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MoEExtError(
            f"cannot read {show(file)}: {show(reason)}; --prompts takes a text file, a prompt a line"
        ) from error
    found = [_prompt(line) for line in lines if line.strip()]
    if not found:
        raise MoEExtError(f"{file} has no prompt: expected one a line")
    return found


def _prompt(line: str) -> str:
    """The text of a JSON line, or the line itself."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return line
    texts = [document.get(name) for name in ("text", "prompt")] if isinstance(document, dict) else [document]
    return next((text for text in texts if isinstance(text, str) and text), line)


def _find_model(server: Server, arguments: argparse.Namespace) -> tuple[str, MoEModel]:
    """(the name to give to `tune`, the model)."""
    if arguments.model:
        return arguments.model, resolve(arguments.model, trust_remote_code=arguments.trust_remote_code)
    name = server_info.ask_model_path(server)
    try:
        return name, resolve(name, trust_remote_code=arguments.trust_remote_code)
    except ModelError as error:
        raise ModelError(f"the server's model is not known here: {error}; name it with --model") from error


def _ask(server: Server, texts: list[str], max_tokens: int, top_k: int) -> list[bytearray]:
    """The rows of each layer, prompt after prompt."""
    gathered: list[bytearray] = []
    with console.Bar() as bar:
        for done, text in enumerate(texts, 1):
            layers = server_routing.split_layers(server_routing.generate(server, text, max_tokens), top_k)
            gathered = gathered or [bytearray() for _ in layers]
            if layers and len(layers) != len(gathered):
                raise EngineError(f"the server returns {len(layers)} layers for prompt {done}, {len(gathered)} before")
            for layer, ids in enumerate(layers):
                gathered[layer] += ids
            bar("prompts", done, len(texts))
    return gathered


def tables(gathered: list[bytearray], model: MoEModel) -> Iterator[RoutingTable]:
    """One of each MoE layer.

    Raises:
        EngineError: the model cannot have such ids.
    """
    layers = [bytes(rows) for rows in gathered]
    for layer in server_routing.routing_layers(layers):
        wrong = server_routing.impossible(layers[layer], model.top_k, model.routed_experts, model.zero_experts)
        if wrong is not None:
            raise EngineError(
                f"layer {layer} of the server gives {model.name} {wrong}; name the model it serves with --model"
            )
        yield RoutingTable(layer, model.top_k, layers[layer])


def _write(folder: Path, found: list[RoutingTable]) -> list[Path]:
    run = capture.new_run()
    try:
        return [capture.write(folder, table, 0, run) for table in found]
    except OSError as error:
        raise MoEExtError(f"cannot write {folder}: {error.strerror}; choose another --output-dir") from error


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Ask the server about each prompt, and give the document of what was written.

    Raises:
        MoEExtError: the server does not answer with routing, or a file cannot be read or written.
    """
    if arguments.max_tokens < 1 or not 0 < arguments.timeout <= LONGEST_S:
        raise MoEExtError(f"--max-tokens and --timeout: expected positive numbers, of at most {LONGEST_S:.0f} seconds")
    texts = prompts(arguments.prompts)
    server = server_routing.connect(arguments.url, arguments.api_key, arguments.timeout)
    name, model = _find_model(server, arguments)
    found = list(tables(_ask(server, texts, arguments.max_tokens, model.top_k), model))
    if not found:
        raise EngineError(f"{arguments.url} returned no layer with experts: it ran none, or each prompt has one token")
    files = _write(arguments.output_dir, found)
    rows = found[0].rows
    words = ["sglang-moe-ext", "tune", "--model", name, "--topk-ids-dir", str(arguments.output_dir)]
    command = shlex.join(words)
    print(f"{len(found)} layers of {model.name}, {rows} tokens of {len(texts)} prompts: {arguments.output_dir}")
    if rows < FEW_ROWS:
        print(f"a batch of {FEW_ROWS} tokens repeats them: use more or longer prompts for a truer routing")
    print(f"next, with the server's --tp-size and --ep-size: {command}")
    written = [str(file) for file in files]
    return {"model": name, "layers": len(found), "tokens": rows, "files": written, "next": command}


COMMAND = Command(
    name="capture",
    summary="record how the tokens of a running SGLang server choose experts, for tune",
    description=(
        "Send prompts to a running SGLang server and record which experts their tokens choose, in one file a layer,\n"
        "which `sglang-moe-ext tune --topk-ids-dir` reads."
    ),
    examples=(
        (
            "sglang-moe-ext capture --url http://127.0.0.1:30000 --prompts prompts.txt",
            "ask the server about each line of prompts.txt; it must run with --enable-return-routed-experts",
        ),
    ),
    add_to=add_to,
    run=run,
)
