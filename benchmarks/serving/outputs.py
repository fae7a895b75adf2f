"""How far the next-token logits of two children lie apart, and how far those of one that takes another tile."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.serving.children import Child
from sglang_moe_ext.core import EngineError

if TYPE_CHECKING:
    import numpy

OTHER_TILE = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 64,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}
"""Unlike the engine's defaults, and legal for bf16 and for blocks of 128: what it changes is the dtype's own error."""


@dataclass(frozen=True, slots=True)
class Distance:
    """Relative L2 error of the logits of a request, and the share of requests whose most probable token is the same.

    The worst request is one of a router that was undecided: another last digit sends a token to another expert.
    """

    median: float
    worst: float
    same_token: float

    def __str__(self) -> str:
        return f"{self.median:.1e} (worst {self.worst:.1e}), same token {self.same_token:.0%}"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of the plugin with stock, after a prefill and a decode step.

    `other_tile`: of stock with stock under OTHER_TILE, after a prefill; `experts_taken`: of `experts`, by the tokens of
    the layer in which they are fewest, in stock.
    """

    prefill: Distance
    decode: Distance
    other_tile: Distance
    experts_taken: int
    experts: int

    def document(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def distance(of: numpy.ndarray, to: numpy.ndarray) -> Distance:
    """Both [requests, vocabulary].

    Raises:
        EngineError: there is a number that is not finite.
    """
    import numpy as np

    if not (np.isfinite(of).all() and np.isfinite(to).all()):
        raise EngineError("the logits are not finite: the model of dummy weights computes nothing")
    errors = np.linalg.norm(to - of, axis=1) / np.maximum(np.linalg.norm(of, axis=1), np.finfo(np.float32).tiny)
    same = of.argmax(axis=1) == to.argmax(axis=1)
    return Distance(float(statistics.median(errors.tolist())), float(errors.max()), float(same.mean()))


def compared(stock: Child, plugin: Child, folder: Path) -> Agreement:
    """Both children compute the same requests; their logits are kept in `folder`.

    Raises:
        EngineError: a child cannot, or computes no numbers.
    """
    import numpy as np

    files = {name: folder / f"logits_{name}.npz" for name in ("stock", "plugin", "other_tile")}
    pairs = stock.ask("logits", to=str(files["stock"]), tile=None)["pairs"]
    plugin.ask("logits", to=str(files["plugin"]), tile=None)
    stock.ask("logits", to=str(files["other_tile"]), tile=OTHER_TILE)
    logits = {name: np.load(file) for name, file in files.items()}
    if not pairs:
        raise EngineError("no layer of the model sorted tokens by expert: it did not run SGLang's Triton MoE kernel")
    return Agreement(
        prefill=distance(logits["stock"]["prefill"], logits["plugin"]["prefill"]),
        decode=distance(logits["stock"]["decode"], logits["plugin"]["decode"]),
        other_tile=distance(logits["stock"]["prefill"], logits["other_tile"]["prefill"]),
        experts_taken=min(sum(count > 0 for count in of_layer) for of_layer in pairs),
        experts=len(pairs[0]),
    )
