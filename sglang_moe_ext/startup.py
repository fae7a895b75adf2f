"""Run by each Python at its start, from a .pth file: waits for an engine's MoE layer, and for upstream's scripts.

Imports next to nothing, not even `__future__`: every process of the environment pays for what stands here.
"""

import os
import sys

from sglang_moe_ext import env, import_hook

TYPE_CHECKING = False  # typing's own would load typing
if TYPE_CHECKING:
    from types import ModuleType

LAYER_MODULES = (
    "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe",
    "sglang.srt.layers.moe.fused_moe_triton.fused_moe",
    "vllm.model_executor.layers.fused_moe.fused_moe",
)
"""As in engines/, which is too much to load here. vLLM loads plugins in all its processes, but no script does."""

LOADING_MODULES = ("sglang.srt.model_executor.model_runner", "vllm.v1.worker.gpu_worker")
"""Each has the function that loads a model, as in engines/*/model_loading.py."""

SCRIPT_MODULES = ("common_utils", "benchmark_moe")
"""Names under which upstream's scripts import their helper, or are imported themselves; in any folder."""
SCRIPT_FUNCTIONS = ("get_model_config", "get_model_params")
"""What is patched: SGLang's and vLLM's, told from other functions of these names by engines/."""
_LONGEST_SCRIPT = 1 << 18


def _attach(layer: "ModuleType") -> None:
    try:
        from sglang_moe_ext.serving.plugin import attach_engine

        attach_engine(layer, "the startup file")
    except Exception as error:  # the engine runs as if we were not installed
        _say(f"cannot hook {layer.__name__}: {error!r}")
    _await_arguments()


def _tune_first(module: "ModuleType") -> None:
    try:
        from sglang_moe_ext.serving.plugin import tune_before_loading

        tune_before_loading(module)
    except Exception as error:  # the engine runs as if we were not installed
        _say(f"cannot hook {module.__name__}: {error!r}")


def _patch(module: "ModuleType") -> None:
    names = vars(module)
    if not any(callable(names.get(name)) for name in SCRIPT_FUNCTIONS):
        return  # another module of that name
    try:
        from sglang_moe_ext.engines.upstream_scripts import patch_module

        patch_module(names)
    except Exception as error:  # the script runs as if we were not installed
        _say(f"cannot patch {module.__file__}: {error!r}")


def _await_arguments() -> None:
    """Where the script that runs mentions one of the functions: patch them when it parses its arguments.

    Nothing imports `__main__`, and a copied helper may have any name: by then all are defined, and none was called.
    """
    try:
        path = getattr(sys.modules.get("__main__"), "__file__", None) or ""
        if not path.endswith(".py") or os.stat(path).st_size > _LONGEST_SCRIPT:
            return
        with open(path, "rb") as script:
            text = script.read()
        if any(name.encode() in text for name in SCRIPT_FUNCTIONS):
            from sglang_moe_ext.engines.upstream_scripts import patch_when_arguments_are_parsed

            patch_when_arguments_are_parsed()
    except Exception as error:  # the script runs as if we were not installed
        _say(f"cannot look at the script that runs: {error!r}")


def _say(text: str) -> None:
    import logging

    logging.getLogger(__name__).warning("sglang-moe-ext %s", text)


def install() -> None:
    """Wait for these modules from now on; SGLANG_MOE_EXT_DISABLE=1 switches it off."""
    if env.is_on(env.DISABLE):
        return
    for name in SCRIPT_MODULES:
        import_hook.on_import(name, _patch)
    for name in LAYER_MODULES:
        import_hook.on_import(name, _attach)
    if env.is_on(env.AUTOTUNE):
        for name in LOADING_MODULES:
            import_hook.on_import(name, _tune_first)
