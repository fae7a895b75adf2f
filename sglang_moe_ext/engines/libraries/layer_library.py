"""What `bench` asks of a library that can run a whole MoE layer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.engines.tensors import LayerTensors

if TYPE_CHECKING:
    import torch

RunLayer = Callable[[LayerTensors], "torch.Tensor"]
"""From the tensors of a batch to [tokens, hidden], sort and sum included. Weights are those of `prepare`."""


class LayerLibrary(Protocol):
    """One library. `PACKAGE`: what pip installs it from; `MODULE`: what is imported."""

    TITLE: str
    PACKAGE: str
    MODULE: str

    def why_unsupported(self, shape: MoEShape) -> str | None:
        """Why it has no kernels for layers of that shape; None where it has."""

    def prepare(self, shape: MoEShape, tensors: LayerTensors) -> RunLayer:
        """Lay out the weights as the library reads them. Imports the library."""


def why_not_usable(library: LayerLibrary, shape: MoEShape) -> str | None:
    """Why it cannot run a layer of that shape in this process; imports it where nothing else stands against it."""
    if shape.ep > 1:
        return "experts of other ranks are not told to it here"
    if not shape.gated:
        return "its activation is not SwiGLU"
    if (why := library.why_unsupported(shape)) is not None:
        return why
    try:
        importlib.import_module(library.MODULE)
    except Exception as error:  # noqa: BLE001 - a library may fail in any way while it is imported
        first = (str(error).strip().splitlines() or ["no message"])[0][:160]
        return f"{library.MODULE} cannot be imported: {type(error).__name__}: {first} (pip: {library.PACKAGE})"
    return None


def why_quantized(shape: MoEShape) -> str | None:
    """Why a library for 16 bits alone does not take the shape."""
    return (
        None
        if shape.quantization.scheme is None
        else f"it is for 16 bits here, and the weights are {shape.quantization}"
    )
