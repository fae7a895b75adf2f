"""A client of a running SGLang server: the time to the first token of one prompt, and tokens a second of many."""

from __future__ import annotations

import http.client
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sglang_moe_ext.core import EngineError

REQUEST_S = 90.0
VOCABULARY = 151_936
"""Of Qwen3: prompts are drawn from all of it, so that tokens choose experts alike."""
_HOST = "127.0.0.1"
_DATA = b"data:"


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that were sent at once, answered in full. `tokens`: generated, of all requests."""

    requests: int
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second, the prefill of the prompts included."""
        return self.tokens / self.seconds


def prompt(tokens: int, seed: int) -> list[int]:
    """Token ids that another seed does not begin with: no cache of prefixes can answer."""
    return random.Random(seed).choices(range(VOCABULARY), k=tokens)


@dataclass(frozen=True, slots=True)
class Client:
    """Sends to the server on that port of this machine."""

    port: int

    def is_healthy(self) -> bool:
        """True once the server has answered a request of its own."""
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def first_token_ms(self, tokens: int, seed: int) -> float:
        """From sending a prompt of so many tokens to the first event of its stream, which has a token.

        Raises:
            EngineError: the server refuses the request, does not answer, or streams something else.
        """
        body = _body(prompt(tokens, seed), most_new=1, is_streamed=True)
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=REQUEST_S)
        try:
            begun = time.perf_counter()
            response = _send(connection, body)
            line = response.readline()
            while line and not line.startswith(_DATA):
                line = response.readline()
            ms = (time.perf_counter() - begun) * 1e3
            _generated(line.removeprefix(_DATA))
            response.read()
            return ms
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"the server did not answer a prompt of {tokens} tokens: {error!r}") from error
        finally:
            connection.close()

    def batch(self, requests: int, tokens: int, new_tokens: int, seed: int) -> Batch:
        """So many requests at once, each with a prompt of `tokens` and an answer of `new_tokens`.

        Raises:
            EngineError: a request fails, or is answered by fewer tokens.
        """
        bodies = [
            _body(prompt(tokens, seed * 1000 + number), most_new=new_tokens, is_streamed=False)
            for number in range(requests)
        ]
        with ThreadPoolExecutor(requests) as pool:
            begun = time.perf_counter()
            generated = list(pool.map(self._whole_answer, bodies))
            seconds = time.perf_counter() - begun
        if sum(generated) != requests * new_tokens:
            raise EngineError(f"{requests} requests got {sum(generated)} tokens, expected {new_tokens} each")
        return Batch(requests, sum(generated), seconds)

    def _whole_answer(self, body: bytes) -> int:
        """The number of generated tokens."""
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=REQUEST_S)
        try:
            return _generated(_send(connection, body).read())
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"the server did not answer one of many requests: {error!r}") from error
        finally:
            connection.close()


def _body(ids: list[int], *, most_new: int, is_streamed: bool) -> bytes:
    sampling = {"temperature": 0, "max_new_tokens": most_new, "ignore_eos": True}
    return json.dumps({"input_ids": ids, "sampling_params": sampling, "stream": is_streamed}).encode()


def _send(connection: http.client.HTTPConnection, body: bytes) -> http.client.HTTPResponse:
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise EngineError(f"the server answered {response.status}: {response.read(300)!r}")
    return response


def _generated(text: bytes) -> int:
    """How many tokens an answer says that it has.

    Raises:
        EngineError: it is not the answer to a request to generate.
    """
    try:
        answer: dict[str, Any] = json.loads(text)
        return int(answer["meta_info"]["completion_tokens"])
    except (ValueError, LookupError, TypeError):
        raise EngineError(f"the server answered {text[:200]!r}, expected generated tokens") from None
