"""vLLM's own table lookup, run from its files without the rest of the engine, and with it what our hooks replace."""

from __future__ import annotations

import logging
import os
import re
from types import ModuleType, SimpleNamespace

from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines import partial_import
from sglang_moe_ext.engines.vllm import bootstrap, hook_points, installation
from sglang_moe_ext.engines.vllm.installation import LAYER_MODULE, VllmInstallation

_LOOKUP = (hook_points.LOOKUP, "get_moe_wna16_block_config", "should_moe_wna16_use_cuda")
_LAUNCHERS = (hook_points.LAUNCH, hook_points.LAUNCH_GROUPS)


class _Cuda:
    """Stands for the platform; the GPU's name is what the request pretends."""

    @staticmethod
    def is_cuda() -> bool:
        return True

    @staticmethod
    def is_rocm() -> bool:
        return False

    @classmethod
    def get_device_name(cls, *_: int) -> str:
        raise NotImplementedError


def load() -> tuple[VllmInstallation, ModuleType]:
    """The engine, and the functions of its lookup.

    Raises:
        EngineError: they need more than this module knows to give.
    """
    engine = installation.find()
    if engine is None:
        raise EngineError("vLLM is not installed in this environment")
    if os.environ.get(bootstrap.BATCH_INVARIANT):
        raise EngineError(f"{bootstrap.BATCH_INVARIANT} is set, and the engine alone reads it")
    partial_import.stand_in_for_torch()
    platform = _Cuda()
    partial_import.stand_in("vllm.platforms", current_platform=platform)
    envs = SimpleNamespace(VLLM_BATCH_INVARIANT=False, VLLM_TUNED_CONFIG_FOLDER=os.environ.get(env.VLLM_CONFIG_FOLDER))
    given = {"envs": envs, "current_platform": platform, "init_logger": _logger}
    layer_file = engine.root.joinpath(*LAYER_MODULE.split(".")[1:]).with_suffix(".py")
    package = partial_import.stand_in(LAYER_MODULE.rpartition(".")[0], get_config=lambda: None)
    package.__file__ = str(layer_file.with_name("__init__.py"))
    for name, function in (("platform_utils", "get_device_name_as_file_name"), ("math_utils", "next_power_of_2")):
        file = engine.root / "utils" / f"{name}.py"
        if f"\ndef {function}(" in file.read_text(encoding="utf-8"):
            given[function] = getattr(
                partial_import.load(f"vllm.utils.{name}", file, (function,), {"re": re}), function
            )
    layer = partial_import.load(LAYER_MODULE, layer_file, _LOOKUP, given, _LAUNCHERS)
    kernel_file = layer_file.with_name(f"{hook_points.KERNEL_MODULE.rpartition('.')[2]}.py")
    kernel = f"{hook_points.KERNEL_CLASS}.__init__"
    partial_import.load(hook_points.KERNEL_MODULE, kernel_file, (), {}, (kernel,))
    return engine, layer


class _OnceLogger(logging.LoggerAdapter[logging.Logger]):
    """vLLM's logger: it says some lines once, and is told in which process."""

    def warning_once(self, text: str, *arguments: object, **_: object) -> None:
        self.logger.warning(text, *arguments)

    def info_once(self, text: str, *arguments: object, **_: object) -> None:
        self.logger.info(text, *arguments)

    def addHandler(self, handler: logging.Handler) -> None:  # noqa: N802 - logging's name
        self.logger.addHandler(handler)


def _logger(name: str) -> _OnceLogger:
    return _OnceLogger(logging.getLogger(name), {})
