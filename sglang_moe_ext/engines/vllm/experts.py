"""Whether the experts that vLLM builds for a layer ever ask for a configuration of the Triton kernel."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from sglang_moe_ext.engines.vllm.targets import LOOKUP

_PARTS = ("experts", "fallback_experts")
"""Of experts that choose between two others at each call."""


def read_tables(experts: object) -> bool:
    """True where some method of theirs, or of the experts that they choose from, names the lookup.

    One that a subclass has replaced counts: better a table in vain than one called useless that is not.
    """
    parts = [experts, *(part for name in _PARTS if (part := getattr(experts, name, None)) is not None)]
    return any(LOOKUP in names for part in parts for names in _names(type(part)))


def _names(kind: type) -> Iterator[tuple[str, ...]]:
    for base in kind.__mro__:
        for method in vars(base).values():
            code = getattr(inspect.unwrap(method) if callable(method) else None, "__code__", None)
            if code is not None:
                yield code.co_names
