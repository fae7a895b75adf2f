"""What of a running vLLM our hooks replace: its lookup, its launchers, and what is built for each layer."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.lookup_args import LookupLayer
from sglang_moe_ext.engines.running_engine import AnyFunction
from sglang_moe_ext.engines.vllm import installation
from sglang_moe_ext.engines.vllm.installation import VllmInstallation

LOOKUP, TABLE = "try_get_optimal_moe_config", "get_moe_configs"
GROUPS_RUN_TRITON = (0, 33, 0)
"""From there on weights of groups run a Triton kernel at every M; 0.20 and 0.25 take a CUDA kernel at few tokens."""
LAUNCH, LAUNCH_GROUPS = "invoke_fused_moe_triton_kernel", "invoke_fused_moe_wna16_triton_kernel"
KERNEL_MODULE, KERNEL_CLASS = "vllm.model_executor.layers.fused_moe.modular_kernel", "FusedMoEKernel"
CONFIG_POSITION = 11
"""Of the launchers' `config`, in all releases from 0.20 to 0.33."""
_LOOKUP_PARAMETERS = ("w1_shape", "w2_shape", "top_k", "dtype", "M", "block_shape")
_TABLE_PARAMETERS = ("E", "N", "dtype", "block_n", "block_k")
_CACHE = ("cache_clear", "cache_info", "cache_parameters")
_LAUNCH_NAMED = {"use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "block_shape"}
_GROUPS_NAMED = {"use_int8_w8a16", "use_int4_w4a16", "block_shape"}
_USES_CUDA = "should_moe_wna16_use_cuda"
_USES_CUDA_PARAMETERS = ("num_valid_tokens", "group_size", "num_experts", "bit")


@dataclass(frozen=True, slots=True)
class VllmHookPoints:
    """The modules of one running engine, and its own functions, whatever stands there now."""

    engine: VllmInstallation
    package: ModuleType
    layer: ModuleType
    lookup: AnyFunction
    table: Any
    launch: AnyFunction
    launch_groups: AnyFunction
    kernel: type

    @property
    def building(self) -> AnyFunction:
        """What puts a layer's experts into place when a model is loaded."""
        made: AnyFunction = vars(self.kernel)["__init__"]
        return made

    @property
    def triton(self) -> str | None:
        """The Triton that it runs with."""
        return self.engine.triton

    def override(self) -> object:
        """The configuration of the engine's `override_config`, None where none is in force."""
        # The package defines it below the import of the layer, which may be what called us.
        return self.package.get_config()

    def is_deterministic(self) -> bool:
        """Whether the server promises the same result whatever the batch: then the engine reads no table."""
        return bool(self.layer.envs.VLLM_BATCH_INVARIANT)

    def device_name(self) -> str | None:
        """The GPU's name as the driver states it; None where the engine knows none."""
        try:
            name: str | None = self.layer.current_platform.get_device_name()
        except NotImplementedError:  # of a platform that is none
            return None
        return name

    def runs_cuda(self, layer: LookupLayer, tokens: int) -> bool:
        """Whether a CUDA kernel runs the layer, whose tiles are not those of a Triton kernel."""
        if self.engine.version >= GROUPS_RUN_TRITON:
            return False
        if layer.dtype not in ("int4_w4a16", "int8_w8a16") or not layer.block_shape or not layer.block_shape[1]:
            return False
        bits = 4 if layer.dtype == "int4_w4a16" else 8
        uses_cuda = getattr(self.layer, _USES_CUDA)
        return bool(uses_cuda(tokens * layer.top_k, layer.block_shape[1], layer.w1_shape[0], bits))


def locate(layer: ModuleType) -> VllmHookPoints:
    """What is to be replaced in the engine whose layer module this is.

    Raises:
        EngineError: something is not where it was in the releases that are known, or takes other arguments.
    """
    engine = installation.find()
    if engine is None:
        raise EngineError("vLLM has no metadata of its release")
    package = sys.modules[layer.__name__.rpartition(".")[0]]
    kernel = getattr(sys.modules.get(KERNEL_MODULE), KERNEL_CLASS, None)
    if not inspect.isclass(kernel):
        raise EngineError(f"{KERNEL_MODULE} has no class {KERNEL_CLASS}, or was not imported with the layer")
    lookup, table, launch, launch_groups = (_function(layer, name) for name in (LOOKUP, TABLE, LAUNCH, LAUNCH_GROUPS))
    targets = VllmHookPoints(engine, package, layer, lookup, table, launch, launch_groups, kernel)
    if wrong := next(_misfits(targets), None):
        raise EngineError(wrong)
    return targets


def _function(module: ModuleType, name: str) -> Any:
    function = getattr(module, name, None)
    if not inspect.isfunction(inspect.unwrap(function) if callable(function) else None):
        raise EngineError(f"{module.__name__} has no function {name}")
    return function


def _parameters(function: AnyFunction) -> list[str]:
    return list(inspect.signature(function).parameters)


def _takes(function: AnyFunction, known: Sequence[str]) -> bool:
    """Whether it takes the known arguments in their order; any argument added by a future release must have a default.

    A call that gives such an argument is the engine's own: the hooks know nothing of it.
    """
    found = list(inspect.signature(function).parameters.values())
    added = found[len(known) :]
    names = tuple(it.name for it in found[: len(known)])
    optional = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return names == tuple(known) and all(
        it.default is not inspect.Parameter.empty or it.kind in optional for it in added
    )


def _misfits(targets: VllmHookPoints) -> Iterator[str]:
    """What is not as it was, in words."""
    for name, function, known in (
        (LOOKUP, targets.lookup, _LOOKUP_PARAMETERS),
        (TABLE, targets.table, _TABLE_PARAMETERS),
        (_USES_CUDA, _function(targets.layer, _USES_CUDA), _USES_CUDA_PARAMETERS),
    ):
        if not _takes(function, known):
            yield f"{name} takes other arguments: {', '.join(_parameters(function))}"
    if missing := [name for name in _CACHE if not callable(getattr(targets.table, name, None))]:
        yield f"{TABLE} has no {missing[0]}"
    for name, function, named in (
        (LAUNCH, targets.launch, _LAUNCH_NAMED),
        (LAUNCH_GROUPS, targets.launch_groups, _GROUPS_NAMED),
    ):
        launched = _parameters(function)
        if (launched[:2], launched[CONFIG_POSITION : CONFIG_POSITION + 1]) != (["A", "B"], ["config"]):
            yield f"{name} takes its config elsewhere: {', '.join(launched)}"
        elif missing := sorted(named - set(launched)):
            yield f"{name} takes no {missing[0]}"
    if _parameters(targets.kernel)[1:2] != ["fused_experts"]:
        yield f"{KERNEL_CLASS} takes its experts elsewhere"
    if "\ndef get_config(" not in Path(str(targets.package.__file__)).read_text(encoding="utf-8"):
        yield f"{targets.package.__name__} has no function get_config"
    for name in ("envs", "current_platform"):
        if not hasattr(targets.layer, name):
            yield f"{targets.layer.__name__} has no {name}"
