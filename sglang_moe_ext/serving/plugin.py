"""The entry points that SGLang and vLLM call in each of their processes. They never raise."""

from __future__ import annotations

import logging

from sglang_moe_ext import __version__

log = logging.getLogger(__name__)


def _say_what_is_active(engine: str) -> None:
    log.info(
        "sglang-moe-ext %s is installed: %s reads its tables from where they were installed, no hook is active",
        __version__,
        engine,
    )


def register_sglang() -> None:
    """Entry point of the group `sglang.srt.plugins` (SGLang 0.5.11 and newer)."""
    _say_what_is_active("SGLang")


def register_vllm() -> None:
    """Entry point of the group `vllm.general_plugins`; vLLM ends when one raises, and calls it repeatedly."""
    _say_what_is_active("vLLM")
