"""What of a running SGLang our hooks replace: functions, found, checked and replaced wherever they are bound."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.running_engine import AnyFunction
from sglang_moe_ext.engines.sglang import installation
from sglang_moe_ext.engines.sglang.installation import SglangInstallation

LAYER_MODULES = (
    "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe",
    "sglang.srt.layers.moe.fused_moe_triton.fused_moe",
)
"""Where the layer lies since 0.5.11, and up to 0.5.10: once it has been executed, all that we replace is there."""

LOOKUP, LAUNCH = "try_get_optimal_moe_config", "invoke_fused_moe_kernel"
SEQUENCE = "_fused_moe_kernel_sequence"
"""All kernels of a layer behind the sort of its tokens; a function of its own since 0.5.11."""
SORT = "moe_align_block_size"
"""In the layer's module: called straight behind the lookup, and for the sequence of kernels alone, up to 0.5.23."""
# By position, as the engine's own callers give them; what follows goes by name.
_LOOKUP_PARAMETERS = ("w1_shape", "w2_shape", "top_k", "dtype", "M", "is_marlin", "block_shape")
_LOOKUP_NAMED = "return_down_config"
_DEFAULT_PARAMETERS = ("M", "E", "N", "K", "topk", "dtype", "is_marlin", "block_shape")
CONFIG_POSITION = 14
"""Of the launcher's `config`, in all releases from 0.5.5 to 0.5.23."""


@dataclass(frozen=True, slots=True)
class SglangHookPoints:
    """The modules of one running engine; the functions are its own, whatever stands there now.

    `sequence` None: this release has none that our path could stand for.
    """

    engine: SglangInstallation
    package: ModuleType
    config: ModuleType
    kernels: ModuleType
    layer: ModuleType
    lookup: AnyFunction
    launch: AnyFunction
    sequence: AnyFunction | None

    @property
    def triton(self) -> str | None:
        """The Triton that it runs with."""
        return self.engine.triton

    def override(self) -> object:
        """The configuration of the engine's `override_config`, None where none is in force."""
        # The package defines it below the import of the layer, which may be what called us.
        return self.package.get_config()

    def is_deterministic(self) -> bool:
        """Whether the server promises the same result whatever the batch: then the engine reads no table.

        Raises:
            EngineError: this release says it in a way that is not known.
        """
        return self._setting(self.config, "deterministic", "enable_deterministic_inference")

    def sums_in_the_down_gemm(self) -> bool:
        """Whether the server lets the down GEMM add up what the experts of a token give, and across ranks.

        Raises:
            EngineError: this release says it in a way that is not known.
        """
        return self._setting(self.layer, "moe", "enable_fused_moe_sum_all_reduce")

    def _setting(self, module: ModuleType, group: str, name: str) -> bool:
        if exec_of := getattr(module, "get_exec", None):  # since 0.5.17
            return bool(getattr(getattr(exec_of(), group), name))
        for of in ("get_server_args", "get_global_server_args"):
            if server_args := getattr(module, of, None):
                return bool(getattr(server_args(), name))
        raise EngineError(f"SGLang {self.engine.version_text} says nowhere what {name} is")

    def device_name(self) -> str | None:
        """The GPU's name as the engine puts it into the names of tables; None where it knows none."""
        name: str | None = self.config.get_device_name()
        return name

    def default_entry(self, tokens: int, shapes: tuple[Any, Any], rest: tuple[Any, ...]) -> dict[str, Any]:
        """What the engine runs where it has no table. `shapes` of w1 and w2; `rest`: top_k, dtype, is_marlin, block."""
        (_, _, hidden_size), (experts, _, columns) = shapes
        entry: dict[str, Any] = self.config.get_default_config(tokens, experts, columns, hidden_size, *rest)
        return entry


def locate(layer: ModuleType) -> SglangHookPoints:
    """What is to be replaced in the engine whose layer module this is.

    Raises:
        EngineError: something is not where it was in the releases that are known, or takes other arguments.
    """
    engine = installation.find()
    if engine is None:
        raise EngineError("SGLang has no metadata of its release")
    package = sys.modules[layer.__name__.rpartition(".")[0]]
    config = _module(f"{package.__name__}.fused_moe_triton_config")
    kernels = _module(engine.kernel_module)
    sequence = _function(layer, SEQUENCE) if hasattr(layer, SEQUENCE) else None
    targets = SglangHookPoints(
        engine, package, config, kernels, layer, _function(config, LOOKUP), _function(kernels, LAUNCH), sequence
    )
    _check(targets, layer)
    return targets


def _module(name: str) -> ModuleType:
    if name not in sys.modules:
        raise EngineError(f"{name} was not imported with the layer")
    return sys.modules[name]


def _function(module: ModuleType, name: str) -> AnyFunction:
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        raise EngineError(f"{module.__name__} has no function {name}")
    return function


def _check(targets: SglangHookPoints, layer: ModuleType) -> None:
    asked = list(inspect.signature(targets.lookup).parameters)
    if tuple(asked[: len(_LOOKUP_PARAMETERS)]) != _LOOKUP_PARAMETERS or _LOOKUP_NAMED not in asked:
        raise EngineError(f"{LOOKUP} takes other arguments: {', '.join(asked)}")
    launched = list(inspect.signature(targets.launch).parameters)
    if launched[CONFIG_POSITION : CONFIG_POSITION + 1] != ["config"]:
        raise EngineError(f"{LAUNCH} takes its config elsewhere: {', '.join(launched)}")
    default = tuple(inspect.signature(_function(targets.config, "get_default_config")).parameters)
    if default != _DEFAULT_PARAMETERS:
        raise EngineError(f"get_default_config takes other arguments: {', '.join(default)}")
    _function(targets.config, "get_device_name")
    if "\ndef get_config(" not in Path(str(targets.package.__file__)).read_text(encoding="utf-8"):
        raise EngineError(f"{targets.package.__name__} has no function get_config")
    for name, function in ((LOOKUP, targets.lookup), (LAUNCH, targets.launch)):
        if getattr(layer, name, None) is not function:
            raise EngineError(f"{layer.__name__} does not use {name}")
