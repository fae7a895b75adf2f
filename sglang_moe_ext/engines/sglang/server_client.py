"""One exchange with a running server over HTTP, bounded in time and bytes; every failure is one line."""

from __future__ import annotations

import http.client
import ipaddress
import json
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.untrusted import show

LONGEST_S = 86_400.0
_TIMEOUT_S = 30.0
_MOST_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 16
_REASON_BYTES = 300
_FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    http.client.HTTPException,
)
"""What the standard library raises for what a server may send; RecursionError and URLError are of these."""


def address(url: str) -> str:
    """The URL of a server as a user gives it, without the slash at its end.

    Raises:
        EngineError: it is none.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isprintable()
    except ValueError:
        is_address = False
    if not is_address or " " in url:
        raise EngineError(f"--url {show(url)}: expected the address of a server, such as http://127.0.0.1:30000")
    return url.rstrip("/")


def clean_key(api_key: str | None) -> str | None:
    """The key without blanks and line ends around it, as a file with one has; None where nothing is left.

    Raises:
        EngineError: no header of HTTP can have it; the message does not repeat it.
    """
    key = (api_key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise EngineError("--api-key has a character that no HTTP header can have: give printable ASCII, on one line")
    return key or None


def is_loopback(url: str) -> bool:
    """True where the address is certainly this machine's own."""
    host = urllib.parse.urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def request(url: str, api_key: str | None, document: object | None = None) -> urllib.request.Request:
    """What asks for that address, or posts a document to it. A redirection elsewhere does not take the key along.

    Raises:
        EngineError: the key is none.
    """
    asked = urllib.request.Request(url)
    if document is not None:
        asked.data = json.dumps(document).encode()
        asked.add_header("Content-Type", "application/json")
    key = clean_key(api_key)
    if key is not None:
        asked.add_unredirected_header("Authorization", f"Bearer {key}")
    return asked


class _SameServer(urllib.request.HTTPRedirectHandler):
    """Follows a redirection to another path of the same server, and none to another one."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl)[:2] != urllib.parse.urlsplit(req.full_url)[:2]:
            raise OSError(f"it redirects to another server, {show(newurl, 100)}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What a server answered: the status, its reason where it is an error's, and as much of the body as was read."""

    status: int
    body: bytes = field(repr=False)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Server:
    """An SGLang server: where it answers, how long one exchange may take, and how much it may answer."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = _TIMEOUT_S
    most_bytes: int = _MOST_BYTES

    def ask(self, path: str, document: object | None = None) -> object:
        """The JSON document at that path, or the answer to one that is posted there.

        Raises:
            EngineError: it does not answer, or with an error, or with something else.
        """
        found = self.ask_first((path,), document)
        if found is None:
            raise EngineError(f"{show(self.url + path)} answers HTTP 404: is that an SGLang server's address?")
        return found

    def ask_first(self, paths: Iterable[str], document: object | None = None) -> object | None:
        """The document at the first of these paths that the server knows; None where it knows none of them.

        Raises:
            EngineError: as `ask`.
        """
        for path in paths:
            url = address(self.url) + path
            answer = self._exchange(url, document)
            if answer.status != http.client.NOT_FOUND:
                return _parse(answer, url)
        return None

    def _exchange(self, url: str, document: object | None) -> HttpAnswer:
        """From the name of the host to the last byte, in a thread that is left behind where that takes too long."""
        if not 0 < self.timeout_s <= LONGEST_S:
            raise EngineError(f"--timeout: expected seconds above 0, of at most {LONGEST_S:.0f}")
        asked = request(url, self.api_key, document)
        outcome: queue.SimpleQueue[HttpAnswer | Exception] = queue.SimpleQueue()
        thread = threading.Thread(target=self._run, args=(asked, outcome), daemon=True)
        thread.start()
        try:
            found = outcome.get(timeout=self.timeout_s)
        except queue.Empty:
            raise EngineError(
                f"cannot reach {show(url)}: no whole answer within {self.timeout_s:g} s; is the server up, and is that "
                "its address?"
            ) from None
        if isinstance(found, HttpAnswer):
            return found
        reason = getattr(found, "reason", None) or str(found) or type(found).__name__
        raise EngineError(
            f"cannot reach {show(url)}: {show(reason)}; is the server up, and is that its address?"
        ) from found

    def _run(self, asked: urllib.request.Request, outcome: queue.SimpleQueue[HttpAnswer | Exception]) -> None:
        end = time.monotonic() + self.timeout_s
        handlers: list[urllib.request.BaseHandler] = [_SameServer()]
        if is_loopback(asked.full_url):
            handlers.append(urllib.request.ProxyHandler({}))
        try:
            outcome.put(self._send(urllib.request.build_opener(*handlers), asked, end))
        except _FAILURES as error:
            outcome.put(error)

    def _send(self, opener: urllib.request.OpenerDirector, asked: urllib.request.Request, end: float) -> HttpAnswer:
        try:
            with opener.open(asked, timeout=self.timeout_s) as answer:
                return HttpAnswer(answer.status, _read(answer, self.most_bytes, end))
        except urllib.error.HTTPError as error:
            body = b""
            with suppress(*_FAILURES):
                body = error.read1(_REASON_BYTES)
            return HttpAnswer(error.code, body, show(str(error.reason), 80))


def _read(answer: http.client.HTTPResponse, most_bytes: int, end: float) -> bytes:
    """Raises: ValueError where there is more, TimeoutError where it comes too slowly."""
    body = bytearray()
    while data := answer.read1(_CHUNK_BYTES):
        body += data
        if len(body) > most_bytes:
            raise ValueError(f"it answers more than {most_bytes >> 20} MiB")
        if time.monotonic() > end:
            raise TimeoutError("its answer does not end")
    return bytes(body)


def _parse(answer: HttpAnswer, url: str) -> object:
    if answer.status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
        raise EngineError(f"{show(url)} answers HTTP {answer.status}: give the server's key with --api-key")
    if answer.status >= http.client.BAD_REQUEST:
        said = " ".join(answer.body.decode(errors="replace").split()) or answer.reason
        raise EngineError(f"{show(url)} answers HTTP {answer.status}: {show(said)}; look into the server's log")
    try:
        document: object = json.loads(answer.body)
    except (ValueError, RecursionError, MemoryError) as error:
        raise EngineError(
            f"{show(url)} answers no JSON: is that an SGLang server's address? --url takes the address of one"
        ) from error
    return document
