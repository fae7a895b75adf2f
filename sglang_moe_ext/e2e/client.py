"""A client of a running server: the time to the first token of one prompt, and tokens a second of many at once.

Whatever the server does, a request ends within its time and reads no more than its share of bytes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.generation import APIS, HEALTH, GenerationApi
from sglang_moe_ext.engines.sglang.server_client import clean_key
from sglang_moe_ext.untrusted import show

REQUEST_S = 90.0
VOCABULARY = 32_000
"""Prompts are drawn from so many ids, which every large model has."""
_HEALTH_S = 5.0
_DATA = b"data:"
_LONGEST_LINE = 1 << 20
_MOST_BYTES = 64 << 20
_SHOWN_BYTES = 300
_FAILURES = (OSError, http.client.HTTPException, ValueError, AttributeError)
"""What the standard library raises for what a server may send; the last where its socket was closed meanwhile."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Milliseconds from sending a prompt to the first token of its answer, and to the end of the answer."""

    ms: float
    whole_ms: float


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


def prompt(tokens: int, seed: int | str, vocabulary: int = VOCABULARY) -> list[int]:
    """Token ids that neither another seed nor another length begins with: no cache of prefixes can answer."""
    return random.Random(f"{tokens} {seed}").choices(range(vocabulary), k=tokens)


@dataclass(frozen=True, slots=True)
class Client:
    """Sends to the server at that address. `model`: the name that its requests need, where they need one."""

    url: str
    api: GenerationApi = APIS["sglang"]
    vocabulary: int = VOCABULARY
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = REQUEST_S

    def at(self, url: str) -> Client:
        """The same for the server at that address."""
        return replace(self, url=url)

    def with_model(self, model: str) -> Client:
        """The same for a server that wants its model called so."""
        return replace(self, model=model)

    def is_healthy(self) -> bool:
        """True once the server has answered a request of its own."""
        try:
            with self._connection(_HEALTH_S) as connection:
                connection.request("GET", self._path(HEALTH), headers=self._headers())
                return connection.getresponse().status == http.client.OK
        except _FAILURES:
            return False

    def first_token_ms(self, tokens: int, seed: int | str) -> float:
        """The milliseconds to the first token alone, as `first_token`."""
        return self.first_token(tokens, seed).ms

    def first_token(self, tokens: int, seed: int | str) -> FirstToken:
        """Send a prompt of so many tokens, for one new token, and time the first event of its stream, which has it.

        Raises:
            EngineError: the server refuses the request, does not answer in time, or streams something else.
        """
        body = self._body(tokens, seed, most_new=1, is_streamed=True)
        try:
            with self._connection(self.timeout_s) as connection:
                begun = time.perf_counter()
                response = self._send(connection, body)
                first = next(_events(response), b"")
                ms = (time.perf_counter() - begun) * 1e3
                if not self.api.has_token(_parsed(first)):
                    raise EngineError(f"the server answered {first[:200]!r}, expected generated tokens")
                _read(response)
                return FirstToken(ms, (time.perf_counter() - begun) * 1e3)
        except _FAILURES as error:
            raise EngineError(f"the server did not answer a prompt of {tokens} tokens: {_why(error)}") from error

    def batch(self, requests: int, tokens: int, new_tokens: int, seed: int | str) -> Batch:
        """So many requests at once, each with a prompt of `tokens` and an answer of `new_tokens`.

        Raises:
            EngineError: a request fails, or is answered by fewer tokens.
        """
        bodies = [
            self._body(tokens, f"{seed} {requests} {number}", most_new=new_tokens, is_streamed=False)
            for number in range(requests)
        ]
        outcomes: queue.SimpleQueue[int | EngineError] = queue.SimpleQueue()
        # Daemons, so that an interrupt waits for none of them.
        threads = [threading.Thread(target=self._put_answer, args=(body, outcomes), daemon=True) for body in bodies]
        begun = time.perf_counter()
        try:
            for thread in threads:
                thread.start()
        except RuntimeError as error:
            raise EngineError(f"cannot send {requests} requests at once from here: {error}") from error
        found = [outcomes.get() for _ in threads]
        seconds = time.perf_counter() - begun
        generated = [outcome for outcome in found if isinstance(outcome, int)]
        for outcome in found:
            if isinstance(outcome, EngineError):
                raise outcome
        if sum(generated) != requests * new_tokens:
            raise EngineError(f"{requests} requests got {sum(generated)} tokens, expected {new_tokens} each")
        return Batch(requests, sum(generated), seconds)

    def _put_answer(self, body: bytes, outcomes: queue.SimpleQueue[int | EngineError]) -> None:
        try:
            outcomes.put(self._whole_answer(body))
        except EngineError as error:
            outcomes.put(error)
        except Exception as error:  # noqa: BLE001 - whoever waits for it must not wait for ever
            outcomes.put(EngineError(f"the server did not answer one of many requests: {_why(error)}"))

    def _whole_answer(self, body: bytes) -> int:
        """The number of generated tokens."""
        try:
            with self._connection(self.timeout_s) as connection:
                text = _read(self._send(connection, body))
        except _FAILURES as error:
            raise EngineError(f"the server did not answer one of many requests: {_why(error)}") from error
        try:
            return self.api.tokens_of(_parsed(text))
        except EngineError as error:
            raise EngineError(f"the server answered {text[:200]!r}, {error}") from None

    def _body(self, tokens: int, seed: int | str, *, most_new: int, is_streamed: bool) -> bytes:
        ids = prompt(tokens, seed, self.vocabulary)
        return json.dumps(self.api.body(ids, self.model, most_new=most_new, is_streamed=is_streamed)).encode()

    def _path(self, path: str) -> str:
        return urllib.parse.urlsplit(self.url).path.rstrip("/") + path

    def _headers(self) -> dict[str, str]:
        key = clean_key(self.api_key)
        return {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})

    @contextlib.contextmanager
    def _connection(self, timeout_s: float) -> Iterator[http.client.HTTPConnection]:
        """A connection that is cut off after so long, whatever trickles through it.

        Raises:
            TimeoutError: it was cut off.
        """
        parts = urllib.parse.urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
        connection.connect()
        was_cut = threading.Event()
        watch = threading.Timer(timeout_s, _cut, [connection.sock, was_cut])
        watch.daemon = True
        watch.start()
        try:
            yield connection
        except (EngineError, *_FAILURES) as error:
            if was_cut.is_set():
                raise TimeoutError(f"no whole answer within {timeout_s:g} s") from error
            raise
        finally:
            watch.cancel()
            connection.close()

    def _send(self, connection: http.client.HTTPConnection, body: bytes) -> http.client.HTTPResponse:
        connection.request("POST", self._path(self.api.path), body, self._headers())
        response = connection.getresponse()
        if response.status != http.client.OK:
            said = b""
            with contextlib.suppress(*_FAILURES):
                said = response.read(_SHOWN_BYTES)
            raise EngineError(f"the server answered {response.status}: {said!r}")
        return response


def _why(error: Exception) -> str:
    return show(str(error) or type(error).__name__)


def _cut(connected: socket.socket, was_cut: threading.Event) -> None:
    was_cut.set()
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _events(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The data of each event of a stream.

    Raises:
        ValueError: a line, or what comes before the first event, is too long.
    """
    seen = 0
    while line := response.readline(_LONGEST_LINE):
        seen += len(line)
        if len(line) >= _LONGEST_LINE or seen > _MOST_BYTES:
            raise ValueError(f"it streams more than {_LONGEST_LINE >> 20} MiB in a line")
        if line.startswith(_DATA):
            yield line.removeprefix(_DATA).strip()


def _read(response: http.client.HTTPResponse) -> bytes:
    """Raises ValueError where there is more than an answer can have."""
    text = response.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"it answers more than {_MOST_BYTES >> 20} MiB")
    return text


def _parsed(text: bytes) -> object:
    """None where it is no JSON."""
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found
