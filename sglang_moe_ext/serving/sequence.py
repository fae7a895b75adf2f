"""The function in the place of SGLang's `_fused_moe_kernel_sequence`: our path, where the lookup chose it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_moe_ext.engines import running
from sglang_moe_ext.engines.sglang import sequence
from sglang_moe_ext.engines.sglang.targets import Targets
from sglang_moe_ext.serving.guard import warn_once

Declines = Callable[[tuple[int, ...], tuple[int, ...]], None]
"""What hears of the weights, [experts, ...] of both GEMMs, for which our path is not to be chosen again."""


_OUT_OF_MEMORY = "OutOfMemoryError"
"""Torch's, which says something of this moment, and nothing of the layer."""


def replacement(engine: Targets, original: Callable[..., Any], decline: Declines) -> Callable[..., Any]:
    """A function to stand where `engine.sequence` stood.

    Nothing that the engine's kernels read is written before our last kernel, so whatever fails, theirs can still run.

    Raises:
        EngineError: the original takes other arguments than those that are known.
    """
    parameters, is_traced = sequence.parameters(original), running.is_traced()

    @functools.wraps(original)
    def _fused_moe_kernel_sequence(*args: Any, **kwargs: Any) -> Any:
        path = sequence.path_of(args, kwargs)
        if path is None or is_traced():
            return original(*args, **kwargs)
        try:
            given = parameters.given(args, kwargs)
            gate = sequence.refusal(parameters, given, engine)
            if gate is None:
                return sequence.run(given, path, engine)
            why, is_lasting = gate.why, True
        except Exception as error:  # the engine's own kernels have all that they need
            why, is_lasting = f"{type(error).__name__}: {error}", type(error).__name__ != _OUT_OF_MEMORY
        w1, w2 = (tuple(parameters.given(args, kwargs)[name].shape) for name in ("w1", "w2"))
        warn_once(f"the engine's own kernels run for a layer with weights of {w1} and {w2}: {why}")
        if is_lasting:
            decline(w1, w2)
        return original(*args, **kwargs)

    return _fused_moe_kernel_sequence
