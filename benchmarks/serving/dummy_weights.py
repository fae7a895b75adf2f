"""Weights for a model without a checkpoint whose layers matter: made as training starts them, the same in each process.

The engine's own dummy weights lie within 1e-3: a layer then adds next to nothing to its input, so that outputs agree
whatever the layer does; most fp8 weights round to zero; and GLM's correction bias outweighs its router, so that all
tokens take the same four experts (read in sglang 0.5.15, model_loader/weight_utils.py).
"""

from __future__ import annotations

import importlib
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LOADER = "sglang.srt.model_loader.loader"
VLLM_LOADER = "vllm.model_executor.model_loader.dummy_loader"
FUNCTION = "initialize_dummy_weights"
_SCALE_BLOCK = 128


def put_in_place(name: str = LOADER) -> None:
    """Have the engine's dummy loader, a module of that name, make these."""
    loader = importlib.import_module(name)
    getattr(loader, FUNCTION)  # raises where this release has no such function
    setattr(loader, FUNCTION, spread)


def spread(model: Any, *_: Any) -> None:
    """Fill each parameter from a seed of its own; sums over inputs of size 1 have size 1."""
    for name, parameter in model.state_dict().items():
        if parameter.is_floating_point():
            _fill(name, parameter.data)


def _fill(name: str, weights: torch.Tensor) -> None:
    import torch

    if weights.dim() < 2:  # of norms, biases and corrections of routers
        weights.fill_(1.0 if "norm" in name or "scale" in name else 0.0)
        return
    if "scale" in name:  # of fp8 weights between -1 and 1, one for each block
        weights.fill_(_bound(weights.shape[-1] * _SCALE_BLOCK))
        return
    is_fp8 = weights.element_size() == 1
    bound = 1.0 if is_fp8 else 3**0.5 if "embed" in name else _bound(weights.shape[-1])
    generator = torch.Generator(weights.device).manual_seed(zlib.crc32(name.encode()))
    for part in weights if weights.dim() > 2 else (weights,):  # a 16-bit copy of all experts may not fit
        drawn = torch.empty(part.shape, dtype=torch.float16 if is_fp8 else part.dtype, device=part.device)
        part.copy_(drawn.uniform_(-bound, bound, generator=generator))


def _bound(inputs: int) -> float:
    """Of uniform weights with variance 1 / inputs."""
    return float((3 / inputs) ** 0.5)
