"""SGLang's own table lookup, run from its files without the rest of the engine, and with it what our hooks replace."""

from __future__ import annotations

import importlib.util
import logging
from types import ModuleType, SimpleNamespace
from typing import Any

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines import partial_import
from sglang_moe_ext.engines.sglang import hook_points, installation
from sglang_moe_ext.engines.sglang.installation import SglangInstallation

_NOT_DETERMINISTIC = SimpleNamespace(
    enable_deterministic_inference=False,
    enable_fused_moe_sum_all_reduce=False,
    deterministic=SimpleNamespace(enable_deterministic_inference=False),
    moe=SimpleNamespace(enable_fused_moe_sum_all_reduce=False),
)
"""A server's settings that the lookup asks for, in all releases."""


def load() -> tuple[SglangInstallation, ModuleType]:
    """The engine, and the functions of its lookup; the GPU is what the request pretends.

    Raises:
        EngineError: they need more than this module knows to give.
    """
    engine = installation.find()
    if engine is None:
        raise EngineError("SGLang is not installed in this environment")
    partial_import.stand_in_for_torch()
    settings = dict.fromkeys(("get_exec", "get_global_server_args", "get_server_args"), lambda: _NOT_DETERMINISTIC)
    given: dict[str, Any] = settings | {
        "torch": None,
        "triton": SimpleNamespace(__version__=engine.triton),
        "is_hip": lambda: False,
        "get_device_name": lambda *_: None,
        "_get_cuda_shared_memory_per_block_optin": lambda: None,
    }
    logging.Logger.warning_once = logging.Logger.info_once = logging.Logger.warning  # type: ignore[attr-defined]
    root = engine.root
    config_file = engine.configs_root.parent / "fused_moe_triton_config.py"
    config = partial_import.load(engine.config_module, config_file, (hook_points.LOOKUP,), given)
    _load_package(engine)
    launch = (hook_points.LAUNCH,)
    kernels = partial_import.load(engine.kernel_module, engine.kernel_file, (), {}, launch)
    shared = {name: getattr(module, name) for name, module in ((hook_points.LOOKUP, config), (launch[0], kernels))}
    layer_file = root.joinpath(*engine.layer_module.split(".")[1:]).with_suffix(".py")
    has_sequence = f"\ndef {hook_points.SEQUENCE}(" in layer_file.read_text(encoding="utf-8")
    sequence = (hook_points.SEQUENCE,) if has_sequence else ()
    partial_import.load(engine.layer_module, layer_file, (), settings | shared, sequence)
    return engine, config


def _load_package(engine: SglangInstallation) -> None:
    """The package of the lookup, in which no `override_config` is in force."""
    name = engine.config_module.rpartition(".")[0]
    package = partial_import.stand_in(name, get_config=lambda: None)
    package.__file__ = str(engine.configs_root.parent / "__init__.py")
    package.__spec__ = importlib.util.spec_from_file_location(name, package.__file__)
