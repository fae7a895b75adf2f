"""The method that stands in the place of `apply` of vLLM's Triton experts: our kernels, where a plan names them."""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sglang_moe_ext import import_hook
from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines import lookup_args, running_engine
from sglang_moe_ext.engines.lookup_args import LookupLayer
from sglang_moe_ext.engines.vllm import experts
from sglang_moe_ext.engines.vllm.hook_points import VllmHookPoints
from sglang_moe_ext.kernel_plans import Plan
from sglang_moe_ext.serving.guard import warn_once
from sglang_moe_ext.serving.kernel_selection import KernelPlans
from sglang_moe_ext.untrusted import show

log = logging.getLogger(__name__)

_OUT_OF_MEMORY = "OutOfMemoryError"


def install(engine: VllmHookPoints, plans: KernelPlans) -> None:
    """Replace the method where its class is, now or once its module has been executed."""

    def put_in(module: ModuleType) -> None:
        kind = vars(module).get(experts.CLASS)
        if kind is None:
            return
        try:
            experts.check(original := vars(kind)[experts.METHOD])
            setattr(kind, experts.METHOD, apply_hook(engine, original, plans))
        except (EngineError, KeyError) as error:
            warn_once(f"the engine's own kernels run: {error}")

    if hasattr(engine.layer, experts.CLASS):
        put_in(engine.layer)
    elif experts.MODULE in sys.modules:
        put_in(sys.modules[experts.MODULE])
    else:
        import_hook.on_import(experts.MODULE, put_in)


def apply_hook(engine: VllmHookPoints, original: Callable[..., Any], plans: KernelPlans) -> Callable[..., Any]:
    """As `sglang_hooks.sequence_hook` does it: all kernels of a layer loaded at its first uncaptured call, no compiler
    within a request, and the engine's own kernels wherever ours may not run or fail.
    """
    is_traced, is_capturing = running_engine.is_traced(), running_engine.is_capturing()
    layers: dict[tuple[Any, ...], LookupLayer] = {}

    def plan_of(given: dict[str, Any]) -> tuple[LookupLayer, Plan | None]:
        w1, w2, ids = given["w1"], given["w2"], given["topk_ids"]
        key = (*w1.shape, *w2.shape, ids.shape[1])
        if key not in layers:
            layers[key] = lookup_args.lookup_layer(w1.shape, w2.shape, ids.shape[1], None, None)
        plan = plans.select(layers[key], given["hidden_states"].shape[0], in_graph=is_capturing())
        return layers[key], plan if plan is not None and experts.can_run(plan, w1.shape[0]) else None

    def ran(self: Any, given: dict[str, Any]) -> bool:
        """Whether ours wrote the output."""
        layer, plan = plan_of(given)
        weights = layer.w1_shape, layer.w2_shape
        if (plan is None and weights not in plans.cold) or engine.override() is not None:
            return False
        if (gate := experts.refusal(self, given)) is not None:
            warn_once(f"the engine's own kernels run for a layer with weights of {weights}: {gate.why}")
            plans.decline(*weights)
            return False
        if weights in plans.cold and not is_capturing():
            begun = time.perf_counter()
            cold = [it for it in plans.cold.pop(weights) if experts.can_run(it, given["w1"].shape[0])]
            for it in cold:
                experts.load_kernels(given, it)
            seconds = time.perf_counter() - begun
            log.info("sglang-moe-ext: %d plans are loaded for weights of %s, in %.1f s", len(cold), weights, seconds)
        if plan is None or weights in plans.cold:
            return False
        experts.run(given, plan)
        return True

    @functools.wraps(original)
    def apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_traced():
            return original(self, *args, **kwargs)
        given: dict[str, Any] = {}
        try:
            given = experts.given(args, kwargs)
            if _is_ours(given) and ran(self, given):
                return None
        except Exception as error:  # the engine's own kernels have all that they need
            warn_once(f"the engine's own kernels run: {type(error).__name__}: {show(error)}")
            if type(error).__name__ != _OUT_OF_MEMORY and "w2" in given:
                plans.decline(tuple(given["w1"].shape), tuple(given["w2"].shape))
        return original(self, *args, **kwargs)

    return apply


def _is_ours(given: dict[str, Any]) -> bool:
    """Weights of 16 bits as they lie: what is quantized never has plans here, and is no reason for a line in a log."""
    return bool(given["w1"].dtype == given["hidden_states"].dtype and given["w1"].dim() == given["w2"].dim() == 3)
