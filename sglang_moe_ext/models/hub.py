"""Fetch a file of a model from the Hugging Face hub, and give up within two seconds where the hub cannot be reached."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from sglang_moe_ext.core import ModelError
from sglang_moe_ext.models.config_fields import CONFIG_CLASS_ERRORS, describe_error, refusal

GO_ON = "give a folder that has its config.json, or state the experts with --shape"
PROBE_S = 1.2
"""Seconds that the hub has to answer anything at all, before its client is asked, which retries for half a minute."""


def download(hub_id: str, name: str, *, must_exist: bool = True, hint: str = "") -> Path:
    """The file in the hub's cache, fetched if it is not there yet.

    Without `must_exist`, the result may name no file. `hint` is for the error message.

    Raises: ModelError when it cannot be had.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        complaint = f"not built in, and the hub needs `pip install transformers`; {hint}or {GO_ON}"
        raise refusal(hub_id, complaint) from error
    cached = huggingface_hub.try_to_load_from_cache(hub_id, name)
    if isinstance(cached, str):
        return Path(cached)
    if not huggingface_hub.constants.HF_HUB_OFFLINE and not answers(PROBE_S):
        raise _no_answer(hub_id, name, hint)
    try:
        with _quiet():
            return Path(huggingface_hub.hf_hub_download(hub_id, name))
    except (EntryNotFoundError, _network_error(), *CONFIG_CLASS_ERRORS) as error:
        if not must_exist and isinstance(error, EntryNotFoundError):
            return Path(name)
        raise refusal(
            hub_id,
            f"not built in, and the hub gives no {name} ({describe_error(error)}); {hint}log in or check the name, or "
            f"{GO_ON}",
        ) from error


def _no_answer(hub_id: str, name: str, hint: str) -> ModelError:
    return refusal(
        hub_id, f"not built in, and no {name} can be fetched: the hub does not answer from here; {hint}else {GO_ON}"
    )


def _network_error() -> type[Exception]:
    """httpx's base error, which huggingface_hub >= 1.0 raises; older releases raise OSErrors."""
    try:
        from httpx import HTTPError
    except ImportError:
        return OSError
    return HTTPError


def answers(within_s: float) -> bool:
    """Whether the hub answers at all, with whatever status, through the proxy of the environment."""
    answered, ended = threading.Event(), threading.Event()

    def ask() -> None:
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        try:
            with urlopen(Request(endpoint, method="HEAD"), timeout=within_s):
                answered.set()
        except HTTPError:
            answered.set()
        except (OSError, ValueError, HTTPException):
            pass
        finally:
            ended.set()

    # A thread, because no timeout ends a name lookup that hangs.
    threading.Thread(target=ask, daemon=True).start()
    ended.wait(within_s)
    return answered.is_set()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's warnings and progress bars off the screen: what went wrong is in the error."""
    logger = logging.getLogger("huggingface_hub")
    level, bars = logger.level, os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    logger.setLevel(logging.CRITICAL)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars is None:
            del os.environ["HF_HUB_DISABLE_PROGRESS_BARS"]
        else:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = bars
