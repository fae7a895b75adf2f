"""How each engine's HTTP server is started, and asked to generate tokens after a prompt of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.adapter import EngineName

HEALTH = "/health"
"""Answers 200 once the server serves; of both engines."""
_HERE = ("--host", "127.0.0.1")


@dataclass(frozen=True, slots=True)
class GenerationApi:
    """One engine's. `module`: what `python -m` starts, with `words` before the user's arguments.

    `models`: where the server says by which name a request must call its model, None where none has to.
    """

    engine: EngineName
    module: str
    words: tuple[str, ...]
    path: str
    models: str | None

    def command(self, python: str, arguments: Sequence[str]) -> list[str]:
        """Of a server with these arguments."""
        return [python, "-m", self.module, *self.words, *arguments]

    def body(self, ids: Sequence[int], model: str | None, *, most_new: int, is_streamed: bool) -> dict[str, Any]:
        """A request for exactly so many tokens, the likeliest ones, whatever they are."""
        if self.engine == "vllm":
            streamed = {"stream": True, "stream_options": {"include_usage": True}} if is_streamed else {}
            exactly = {"max_tokens": most_new, "min_tokens": most_new, "ignore_eos": True, "temperature": 0}
            return {"model": model, "prompt": list(ids), **exactly, **streamed}
        sampling = {"temperature": 0, "max_new_tokens": most_new, "ignore_eos": True}
        return {"input_ids": list(ids), "sampling_params": sampling, "stream": is_streamed}

    def has_token(self, event: object) -> bool:
        """Whether an event of a stream brings tokens, as the first one of an answer does."""
        if not isinstance(event, dict):
            return False
        return bool(event.get("choices")) if self.engine == "vllm" else isinstance(event.get("meta_info"), dict)

    def tokens_of(self, answer: object) -> int:
        """How many tokens a whole answer says that it has.

        Raises:
            EngineError: it is not the answer to a request to generate.
        """
        section = "usage" if self.engine == "vllm" else "meta_info"
        try:
            found = answer[section]["completion_tokens"]  # type: ignore[index]
        except (LookupError, TypeError):
            found = None
        if type(found) is not int or found < 0:
            raise EngineError("expected generated tokens, with their number")
        return found

    def model_name(self, answer: object) -> str:
        """The name of the model, from what the server says at `models`.

        Raises:
            EngineError: it says no such thing.
        """
        try:
            found = answer["data"][0]["id"]  # type: ignore[index]
        except (LookupError, TypeError):
            found = None
        if not isinstance(found, str):
            raise EngineError(f"the server does not say at {self.models} which model it serves: is it one of vLLM?")
        return found


APIS: dict[EngineName, GenerationApi] = {
    "sglang": GenerationApi("sglang", "sglang.launch_server", _HERE, "/generate", None),
    "vllm": GenerationApi("vllm", "vllm.entrypoints.cli.main", ("serve", *_HERE), "/v1/completions", "/v1/models"),
}
