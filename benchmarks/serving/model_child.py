"""A child that holds one served model, with or without the plugin, and does one thing at a time that it is told."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.serving import attached, small_limit
from benchmarks.serving.answering import answer_all, take_standard_output
from benchmarks.serving.served_model import Plan, ServedModel


class ModelChild:
    """Answers, by what is asked."""

    def __init__(self) -> None:
        self._said = attached.begin()
        self._model: ServedModel | None = None

    @property
    def model(self) -> ServedModel:
        assert self._model is not None, "load comes first"
        return self._model

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """`plan`, and the `limit` of shared memory that the MoE kernels shall meet, None for the card's own."""
        begun = time.monotonic()
        engine = attached.engine_here()
        if request["limit"] is not None:
            small_limit.simulate(request["limit"])
        plan = request["plan"]
        self._model = ServedModel(engine, Plan(**{**plan, "decode_batches": tuple(plan["decode_batches"])}))
        return {
            "active": attached.is_active(engine),
            "attached_ms": attached.attached_ms(),
            "has_decode_graphs": self.model.has_decode_graphs,
            "seconds": round(time.monotonic() - begun, 1),
        }

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Milliseconds of the case; prefills of one `seed` have the same prompt."""
        if request["kind"] == "prefill":
            return {"ms": self.model.prefill_ms(request["size"], request["seed"])}
        return {"ms": self.model.decode_ms(request["size"])}

    def logits(self, request: dict[str, Any]) -> dict[str, Any]:
        """Writes both arrays to `to`, a .npz file."""
        import numpy as np

        prefill, decode, pairs = self.model.logits(request["tile"])
        np.savez(request["to"], prefill=prefill, decode=decode)
        return {"pairs": pairs}

    def said(self, _: dict[str, Any]) -> dict[str, Any]:
        """What was logged of tables and hooks."""
        return {"lines": self._said.lines}


def main() -> None:
    out = take_standard_output()
    child = ModelChild()
    answer_all(out, {"load": child.load, "run": child.run, "logits": child.logits, "said": child.said})


if __name__ == "__main__":
    main()
