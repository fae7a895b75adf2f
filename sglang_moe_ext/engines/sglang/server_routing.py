"""Asks a server for the routing of its prompts: `return_routed_experts` of `/generate`, and how the ids lie in it.

Since 0.5.7, on a server started with --enable-return-routed-experts (0.5.8: managers/detokenizer_manager.py and
layers/moe/routed_experts_capturer.py; 0.5.12 and after: state_capturer/routed_experts.py). meta_info["routed_experts"]
is the base64 text of int32 [prompt and generated tokens - 1, num_hidden_layers, num_experts_per_tok]: experts of all
ranks, without the fused shared ones, only zeros in a layer without experts. Without the flag the field is missing.
"""

from __future__ import annotations

import array
import base64
import binascii
from collections.abc import Sequence
from typing import Any

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.sglang import server_client
from sglang_moe_ext.engines.sglang.server_client import Server
from sglang_moe_ext.untrusted import show

FLAG = "--enable-return-routed-experts"
_FIELD = "routed_experts"
MOST_BYTES = 512 << 20
"""Of one answer: the text of 8 ids for 128,000 tokens in each of 90 layers is 490 MB."""
_BYTES = 4
_NO_WORK = -1


def connect(url: str, api_key: str | None, timeout_s: float) -> Server:
    """The server at that address, asked for at most that long each time, and for answers as long as routing may be.

    Raises:
        EngineError: it is no address.
    """
    return Server(server_client.address(url), api_key, timeout_s, MOST_BYTES)


def generate(server: Server, prompt: str, max_tokens: int) -> object:
    """The document that the server answers a prompt with, routing included.

    Raises:
        EngineError: it does not answer with one.
    """
    sampling = {"max_new_tokens": max_tokens, "temperature": 0}
    return server.ask("/generate", {"text": prompt, "sampling_params": sampling, "return_routed_experts": True})


def split_layers(answer: object, top_k: int) -> list[bytes]:
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
        raise EngineError(f"the server's {_FIELD} is no base64 text: {show(error)}") from error
    counts = [_member(about, name) for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
        raise EngineError(f"the server does not count its tokens (prompt_tokens, completion_tokens: {show(counts)})")
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


def impossible(ids: bytes, top_k: int, routed_experts: int, zero_experts: int = 0) -> str | None:
    """Why these cannot be the experts of tokens, or None. With zero experts, -1 stands for one of them as well."""
    numbers = array.array("i", ids)
    least, most = (_NO_WORK if zero_experts else 0), routed_experts + zero_experts - 1
    if numbers and not least <= min(numbers) <= max(numbers) <= most:
        return f"experts {min(numbers)} ... {max(numbers)}, and it has 0 ... {most}"
    rows = (numbers[start : start + top_k] for start in range(0, len(numbers), top_k))
    repeated = next((row for row in rows if len(set(row) - {_NO_WORK}) + row.count(_NO_WORK) != top_k), None)
    return None if repeated is None else f"one token the experts {repeated.tolist()}: expected {top_k} different ones"


def _member(document: object, name: str) -> Any:
    return document.get(name) if isinstance(document, dict) else None
