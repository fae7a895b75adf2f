"""Where tables lie for a server: the user's own store, what we ship, and the folder that the engine reads."""

from __future__ import annotations

import os
from pathlib import Path

from sglang_moe_ext import shipped
from sglang_moe_ext.engines.sglang import overlay as directory
from sglang_moe_ext.engines.sglang.installation import Installation
from sglang_moe_ext.serving.shelf import Place
from sglang_moe_ext.store import user_store

ENGINE = "sglang"


def places(engine: Installation) -> list[Place]:
    """In order. A folder that the user names to the engine takes the place of the engine's own."""
    named, own = os.environ.get(directory.VARIABLE), user_store.root_if_any()
    tuned = shipped.folder("tuned_configs")
    return [
        *([] if own is None else [Place("your", own / "tables" / ENGINE)]),
        *([] if tuned is None else [Place("the shipped", tuned / "configs")]),
        Place(
            "the engine's",
            Path(named) / "configs" if named else engine.configs_root,
            is_engines=True,
            is_asked_for=bool(named) and not (own is not None and own / "overlay" in Path(named or "").parents),
        ),
    ]
