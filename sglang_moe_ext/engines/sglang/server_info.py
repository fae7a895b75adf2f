"""Asks a running SGLang which model it serves, how it splits the experts, and which flags decide about tables.

`/get_server_info` in 0.5.5, `/server_info` as well in 0.5.8 to 0.5.23 (entrypoints/http_server.py): one JSON object
with the server's arguments by name, as it resolved them, and its version. It tells neither its GPU nor its plugins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_moe_ext.core import EngineError, ModelError, Parallelism
from sglang_moe_ext.engines.sglang import server_client
from sglang_moe_ext.engines.sglang.installation import parse_version
from sglang_moe_ext.engines.sglang.server_client import Server
from sglang_moe_ext.untrusted import show

_PATHS = ("/server_info", "/get_server_info")
"""The second is the older one, and leaves with some release to come."""
_FIRST_WITH_PLUGINS = (0, 5, 11)
_LONGEST_TEXT = 4096
"""As a path may be."""
_MOST_RANKS = 1 << 16


@dataclass(frozen=True, slots=True)
class RunningServer:
    """What a server says of itself. `parallelism` as its experts are split; `quantization` None: the checkpoint's."""

    url: str
    version_text: str
    model_path: str
    parallelism: Parallelism
    moe_runner_backend: str = "auto"
    moe_a2a_backend: str = "none"
    quantization: str | None = None
    device: str = "cuda"
    fuses_shared_experts: bool = True
    is_deterministic: bool = False
    redundant_experts: int = 0

    @property
    def is_local(self) -> bool:
        """True where it certainly runs on this machine."""
        return server_client.is_loopback(self.url)


def ask(url: str, api_key: str | None = None) -> RunningServer:
    """Ask the server at that address.

    Raises:
        EngineError: nothing answers there, or something else than an SGLang server.
    """
    server = Server(server_client.address(url), api_key)
    return parse(_ask_document(server), server.url)


def ask_model_path(server: Server) -> str:
    """The model as the server was given it.

    Raises:
        EngineError: it does not answer, or does not say.
    """
    document = _ask_document(server)
    if not isinstance(document, dict) or not document.get("model_path"):
        raise EngineError(f"{show(server.url)} does not say which model it serves: name it with --model")
    return _Answer(document, server.url).text("model_path")


def _ask_document(server: Server) -> object:
    document = server.ask_first(_PATHS)
    if document is None:
        raise EngineError(
            f"{show(server.url)} answers, but has no {_PATHS[0]}: --url takes the address of an SGLang server"
        )
    return document


def parse(document: object, url: str) -> RunningServer:
    """Read the answer of the server at `url`.

    Raises:
        EngineError: it is not an SGLang server's.
    """
    if not isinstance(document, dict):
        raise EngineError(
            f"{show(url)} answers {type(document).__name__}, no object: is that an SGLang server's address?"
        )
    answer = _Answer(document, url)
    tp, moe_dp = answer.size("tp_size"), answer.size("moe_dp_size", 1)  # the latter since 0.5.10
    if tp % moe_dp:
        raise EngineError(
            f"{show(url)} answers tp_size {show(tp)} with moe_dp_size {show(moe_dp)}, which does not divide it"
        )
    return RunningServer(
        url=url,
        version_text=answer.text("version"),
        model_path=answer.text("model_path"),
        parallelism=Parallelism(tp // moe_dp, answer.size("ep_size", 1)),
        moe_runner_backend=answer.text("moe_runner_backend", "auto"),
        moe_a2a_backend=answer.text("moe_a2a_backend", "none"),
        quantization=answer.text("quantization", "") or None,
        device=answer.text("device", "cuda"),
        fuses_shared_experts=not answer.switch("disable_shared_experts_fusion"),
        is_deterministic=answer.switch("enable_deterministic_inference"),
        redundant_experts=answer.size("ep_num_redundant_experts", 0, smallest=0),
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    fields: Mapping[str, Any]
    url: str

    def text(self, name: str, default: str | None = None) -> str:
        value = self.fields.get(name)
        value = default if value is None else value
        if not isinstance(value, str) or not (value or default == ""):
            raise self._wrong(name, "a text")
        words = " ".join(value.split())
        if len(words) > _LONGEST_TEXT or not words.isprintable():
            raise self._wrong(name, f"a printable text of at most {_LONGEST_TEXT} letters")
        return words

    def size(self, name: str, default: int | None = None, smallest: int = 1) -> int:
        value = self.fields.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value <= _MOST_RANKS:
            raise self._wrong(name, f"a number from {smallest} on")
        return value

    def switch(self, name: str) -> bool:
        value = self.fields.get(name, False)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def _wrong(self, name: str, expected: str) -> EngineError:
        value = self.fields.get(name)
        found = "nothing" if value is None else repr(show(value, 80)) if isinstance(value, str) else show(value, 80)
        return EngineError(
            f"{show(self.url)} answers {name}={found}, expected {expected}: is that an SGLang server's address?"
        )


def flags(server: RunningServer, given: Mapping[str, Any]) -> dict[str, Any]:
    """The server's answers, by the names of the flags that state the same; `given`: the flags that the user has given.

    Raises:
        ModelError: a flag states what the server answers, or this machine does not have the model's path.
    """
    answers = {
        "shape": None,
        "from_log": None,
        "tp_size": server.parallelism.tp,
        "ep_size": server.parallelism.ep,
        "ep_num_redundant_experts": server.redundant_experts,
        "disable_shared_experts_fusion": not server.fuses_shared_experts,
        "moe_runner_backend": server.moe_runner_backend,
        "enable_deterministic_inference": server.is_deterministic,
    }
    for name in answers:
        if name in given:
            raise ModelError(f"--{name.replace('_', '-')} goes without --url: the server itself says what it runs")
    return answers | _model(server, given) | _quantization(server, given)


def _model(server: RunningServer, given: Mapping[str, Any]) -> dict[str, Any]:
    path = Path(server.model_path)
    if "model" not in given and path.is_absolute() and not path.exists():
        raise ModelError(
            f"{show(server.url)} serves {show(str(path))}, which this machine does not have: add --model, a built-in "
            "name, a folder with its config.json, or a hub id"
        )
    return {"model": given.get("model", server.model_path)}


def _quantization(server: RunningServer, given: Mapping[str, Any]) -> dict[str, Any]:
    """A --dtype of the user's says what the server makes of the weights."""
    if "dtype" in given or "per_channel_quant" in given:
        return {"quantization": None}
    return {"quantization": server.quantization}


def why_no_table(server: RunningServer) -> str | None:
    """Why that server reads no table, apart from its `--moe-runner-backend`; None: it does."""
    if server.device != "cuda":
        return f"that server runs on {show(server.device)}; tables are for GPUs"
    if server.moe_a2a_backend != "none":
        return f"--moe-a2a-backend {show(server.moe_a2a_backend)} does not reach the Triton runner, which reads tables"
    return None


def report(server: RunningServer, version_here: str) -> list[str]:
    """Lines to print before the findings: what the server runs, and what it does not tell."""
    split = f"--tp-size {server.parallelism.tp} --ep-size {server.parallelism.ep}"
    quantized = f" --quantization {show(server.quantization)}" if server.quantization else ""
    is_same = server.version_text == version_here
    old = parse_version(server.version_text) < _FIRST_WITH_PLUGINS
    version = show(server.version_text, 40)
    return [
        f"{show(server.url)}: SGLang {version} serves {show(server.model_path)} on {show(server.device)}, "
        f"{split}{quantized}",
        f"the findings below are of the SGLang {version_here} of this environment, with its Triton, tables and settings"
        + ("" if is_same else f"; that server is SGLang {version}, which may take something else"),
        "the server does not tell whether sglang-moe-ext is active in it"
        + (", and before 0.5.11 the startup file alone loads it" if old else "")
        + ': look for "sglang-moe-ext ... is active" in its log',
        *([] if server.is_local else ["it does not tell its GPU either: without --gpu, this machine's is taken"]),
    ]
