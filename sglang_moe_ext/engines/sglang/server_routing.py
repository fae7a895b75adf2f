"""What a server answers of its routing: `return_routed_experts` of its native `/generate`, and how the ids lie in it.

Since 0.5.7, on a server started with --enable-return-routed-experts (0.5.8: managers/detokenizer_manager.py and
layers/moe/routed_experts_capturer.py; 0.5.12 and after: state_capturer/routed_experts.py). meta_info["routed_experts"]
is the base64 text of int32 [prompt and generated tokens - 1, num_hidden_layers, num_experts_per_tok]: experts of all
ranks, without the fused shared ones, zeros alone in a layer that routes nothing. Without the flag it is not there.
"""

from __future__ import annotations

import array
import base64
import binascii
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.sglang import server_client

FLAG = "--enable-return-routed-experts"
_FIELD = "routed_experts"
_MODEL_INFO = ("/model_info", "/get_model_info")
"""The second is older, and leaves with some release to come."""
_BYTES = 4


@dataclass(frozen=True, slots=True)
class RoutingServer:
    """Where a server answers, and how long it may take to."""

    url: str
    timeout_s: float = 600.0
    api_key: str | None = None

    def model_path(self) -> str:
        """The model as the server was given it.

        Raises:
            EngineError: it does not answer, or does not say.
        """
        newer, older = _MODEL_INFO
        try:
            about = self._ask(newer, None)
        except EngineError:
            about = self._ask(older, None)
        found = _member(about, "model_path")
        if not isinstance(found, str) or not found:
            raise EngineError(f"{self.url} does not say which model it serves: name it with --model")
        return found

    def generate(self, prompt: str, max_tokens: int) -> Any:
        """The document that the server answers a prompt with, routing included.

        Raises:
            EngineError: it does not answer with one.
        """
        sampling = {"max_new_tokens": max_tokens, "temperature": 0}
        return self._ask("/generate", {"text": prompt, "sampling_params": sampling, "return_routed_experts": True})

    def _ask(self, path: str, document: object | None) -> Any:
        address = self.url.rstrip("/") + path
        if not address.startswith(("http://", "https://")):
            raise EngineError(f"--url {self.url}: expected an address such as http://127.0.0.1:30000")
        try:
            request = server_client.request(address, self.api_key, document)
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(300).decode(errors="replace").split())
            raise EngineError(f"{address} answers HTTP {error.code}: {said or error.reason}") from error
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise EngineError(f"cannot ask {address}: {reason}; is that an SGLang server's address?") from error


def layers_of(answer: object, top_k: int) -> list[bytes]:
    """int32 [tokens, top_k] of each layer, dense ones among them, from one answer of `/generate`.

    Raises:
        EngineError: the answer has no routing, or one of another size.
    """
    about = _member(answer, "meta_info")
    text = _member(about, _FIELD)
    if text is None:
        raise EngineError(
            f"the server returns no routing: start it with {FLAG}; SGLang before 0.5.7 has no such flag, "
            "set SGLANG_MOE_EXT_CAPTURE=DIR in its environment there"
        )
    try:
        ids = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise EngineError(f"the server's {_FIELD} is no base64 text: {error}") from error
    counts = [_member(about, name) for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
        raise EngineError(f"the server does not count its tokens (prompt_tokens, completion_tokens: {counts})")
    rows, row_bytes = sum(counts) - 1, top_k * _BYTES
    if rows < 1:
        return []
    if not ids or len(ids) % (rows * row_bytes):
        raise EngineError(
            f"the server returns {len(ids)} bytes of {_FIELD} for {rows} tokens: expected int32 of {top_k} experts in "
            "each layer; name the model that it serves with --model"
        )
    stride = len(ids) // rows
    return [
        b"".join(ids[start : start + row_bytes] for start in range(first, len(ids), stride))
        for first in range(0, stride, row_bytes)
    ]


def routing_layers(layers: Sequence[bytes]) -> list[int]:
    """Which of them are MoE layers: a dense one has zeros alone."""
    return [number for number, ids in enumerate(layers) if ids.count(0) != len(ids)]


def impossible(ids: bytes, top_k: int, routed_experts: int) -> str | None:
    """Why these cannot be the experts of tokens, or None."""
    numbers = array.array("i", ids)
    if numbers and not 0 <= min(numbers) <= max(numbers) < routed_experts:
        return f"experts {min(numbers)} ... {max(numbers)}, and it has 0 ... {routed_experts - 1}"
    rows = (numbers[start : start + top_k] for start in range(0, len(numbers), top_k))
    repeated = next((row for row in rows if len(set(row)) != top_k), None)
    return None if repeated is None else f"one token the experts {repeated.tolist()}: expected {top_k} different ones"


def _member(document: object, name: str) -> Any:
    return document.get(name) if isinstance(document, dict) else None
