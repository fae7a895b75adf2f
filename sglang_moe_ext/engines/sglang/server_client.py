"""One JSON document of a running server, over HTTP."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request

from sglang_moe_ext.core import EngineError

_TIMEOUT_S = 30.0
_MAX_BYTES = 16 * 1024 * 1024


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
        raise EngineError(f"--url {url}: expected the address of a server, such as http://127.0.0.1:30000")
    return url.rstrip("/")


def request(url: str, api_key: str | None, document: object | None = None) -> urllib.request.Request:
    """What asks for that address, or posts a document to it. A redirection elsewhere does not take the key along."""
    asked = urllib.request.Request(url)
    if document is not None:
        asked.data = json.dumps(document).encode()
        asked.add_header("Content-Type", "application/json")
    if api_key:
        asked.add_unredirected_header("Authorization", f"Bearer {api_key}")
    return asked


def get(url: str, api_key: str | None) -> object | None:
    """The JSON document at that address; None where the server knows no such path.

    Raises:
        EngineError: nobody answers, or with an error, or with something else.
    """
    try:
        with urllib.request.urlopen(request(url, api_key), timeout=_TIMEOUT_S) as answer:
            data = answer.read(_MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        if error.code in (401, 403):
            raise EngineError(f"{url} answers HTTP {error.code}: give the server's key with --api-key") from error
        raise EngineError(f"{url} answers HTTP {error.code} {error.reason}: look into the server's log") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise EngineError(f"cannot reach {url}: {reason}; is the server up, and is that its address?") from error
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        document: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{url} answers no JSON: --url takes the address of an SGLang server") from error
    return document
