"""What transformers and the hub know of a model; both are imported on first use, and neither is required."""

from __future__ import annotations

from logging import ERROR
from pathlib import Path

from sglang_moe_ext.core import ModelError
from sglang_moe_ext.shapes.fields import CONFIG_CLASS_ERRORS, Section, refusal, shown

GO_ON = "give a folder that has its config.json, or state the experts with --shape"


def downloaded(hub_id: str, name: str, *, must_exist: bool = True) -> Path:
    """The file in the hub's cache, fetched when it is not there yet; a file that need not exist may not either.

    Raises: ModelError when it cannot be had.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise refusal(hub_id, f"not built in, and the hub needs `pip install transformers`; or {GO_ON}") from error
    try:
        return Path(hf_hub_download(hub_id, name))
    except (EntryNotFoundError, _network_error(), *CONFIG_CLASS_ERRORS) as error:
        if not must_exist and isinstance(error, EntryNotFoundError):
            return Path(name)
        raise refusal(
            hub_id, f"{name} cannot be had from the hub ({_kind(error)}); log in or check the name, or {GO_ON}"
        ) from error


def config_of_class(path: str, *, trust_remote_code: bool) -> Section:
    """The config as its class completes it. `path`: a folder, a file or a hub id.

    Raises: ModelError when transformers is not there, or does not know the class.
    """
    try:
        from huggingface_hub import errors
        from transformers import AutoConfig
        from transformers.utils import logging
    except ImportError as error:
        raise refusal(
            "transformers", "not installed; `pip install transformers` fills in what a config omits"
        ) from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        config: Section = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (
        getattr(errors, "StrictDataclassError", ValueError),
        ImportError,
        AssertionError,
        *CONFIG_CLASS_ERRORS,
    ) as error:
        raise _not_loaded(error, trust_remote_code=trust_remote_code) from error
    finally:
        logging.set_verbosity(verbosity)
    return config


def _network_error() -> type[Exception]:
    """Of httpx, which huggingface_hub >= 1.0 speaks through; what its older releases raise are OSErrors."""
    try:
        from httpx import HTTPError
    except ImportError:
        return OSError
    return HTTPError


def _not_loaded(error: Exception, *, trust_remote_code: bool) -> ModelError:
    if "trust_remote_code" in str(error) and not trust_remote_code:
        return refusal("transformers", "its config class is Python of its own; add --trust-remote-code if you trust it")
    return refusal("transformers", f"cannot load it ({_kind(error)}); upgrade it, or complete the config")


def _kind(error: Exception) -> str:
    return f"{type(error).__name__}: {shown(str(error))}"
