"""Where tables lie for a vLLM server: what the user names to it, the user's own store, what we ship, what it ships."""

from __future__ import annotations

import os
from pathlib import Path

from sglang_moe_ext import shipped
from sglang_moe_ext.engines.vllm.installation import VARIABLE, Installation
from sglang_moe_ext.engines.vllm.naming import DIALECT
from sglang_moe_ext.serving.shelf import Place
from sglang_moe_ext.store import user_store


def places(engine: Installation) -> list[Place]:
    """In order. What SGLang's tables are worth to vLLM nobody has measured: `export` makes them into tables of vLLM's.

    The engine's variable is read and never set, since a value of it has LoRA layers ask for other tables.
    """
    named, own = os.environ.get(VARIABLE), user_store.root_if_any()
    tuned = shipped.folder("tuned_configs")
    return [
        *([] if named is None else [_flat("your", Path(named), is_asked_for=True)]),
        *([] if own is None else [Place("your", own / "tables" / "vllm", dialect=DIALECT)]),
        *([] if tuned is None else [Place("the shipped", tuned / "vllm", dialect=DIALECT)]),
        _flat("the engine's", engine.configs_folder),
    ]


def _flat(name: str, root: Path, *, is_asked_for: bool = False) -> Place:
    return Place(name, root, is_engines=True, is_asked_for=is_asked_for, is_flat=True, dialect=DIALECT)
