"""What each layer of a running engine takes at each M, and one line in its log for each reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from sglang_moe_ext.engines import running
from sglang_moe_ext.engines.asked import Layer
from sglang_moe_ext.serving import overlay, shelf
from sglang_moe_ext.serving.overlay import Choice, Default, Engines, Ours
from sglang_moe_ext.serving.shelf import Place, Shelf

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What is asked of a running engine."""

    @property
    def triton(self) -> str | None: ...

    def is_deterministic(self) -> bool: ...

    def device_name(self) -> str | None: ...


class Choices:
    """Reads the tables of a layer when it first asks."""

    def __init__(self, engine: Engine, places: Callable[[], Sequence[Place]]) -> None:
        self._engine, self._places = engine, places
        self._shelves: dict[Layer, Shelf | None] = {}
        self._said: set[tuple[Layer, str]] = set()

    def of(self, layer: Layer, tokens: int) -> Choice:
        """Which configuration runs, before any guard looks at it."""
        if self._engine.is_deterministic():
            return Engines("deterministic inference reads no table")
        found = self.known_shelf(layer)
        if found is None:
            return Engines("no tables are known for this kind of layer or GPU")
        return overlay.chosen(found, tokens)

    def known_shelf(self, layer: Layer) -> Shelf | None:
        """The tables for it, read once."""
        if layer not in self._shelves:
            self._shelves[layer] = self.shelf(layer)
        return self._shelves[layer]

    def shelf(self, layer: Layer, *, any_layer: bool = False) -> Shelf | None:
        """The tables for it, read now; None where it is of a kind, or on a GPU, that has none."""
        shape, device_name, triton = layer.shape(), self._engine.device_name(), self._engine.triton
        if shape is None or device_name is None or triton is None:
            return None
        gpu = running.gpu(device_name)
        return shelf.gathered(shape, device_name, gpu, triton, self._places(), any_layer=any_layer)

    def say(self, layer: Layer, choice: Choice) -> None:
        """One line for each reason of each layer."""
        if (layer, choice.why) not in self._said:
            self._said.add((layer, choice.why))
            log.info("sglang-moe-ext: %s: %s", layer.shape() or layer, said(choice))

    def forget(self) -> None:
        """Read all tables anew."""
        self._shelves.clear()


def said(choice: Choice) -> str:
    """What a log says of a choice."""
    match choice:
        case Ours():
            return choice.why
        case Default():
            return f"the engine's default, {choice.why}"
        case Engines():
            return f"the engine's own choice, {choice.why}"
