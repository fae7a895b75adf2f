"""What each Python runs at its start, from a .pth file: waits for an engine's MoE layer, and for upstream's scripts.

Nothing is imported before they are, not even `__future__`: all processes of the environment pay for what stands here.
"""

import os

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

MODULE = "common_utils"
FOLDER = "fused_moe_triton"
FUNCTION = "get_model_config"


def _attach(layer: "ModuleType") -> None:
    try:
        from sglang_moe_ext.serving.plugin import attach_engine

        attach_engine(layer, "the startup file")
    except Exception as error:  # the engine runs as if we were not installed
        _say(f"cannot hook {layer.__name__}: {error!r}")


def _patch(module: "ModuleType") -> None:
    if not (module.__file__ or "").endswith(os.sep + os.path.join(FOLDER, f"{MODULE}.py")):
        return  # somebody else's module of that name
    try:
        from sglang_moe_ext.engines.sglang.benchmark_scripts import patch

        names = vars(module)
        if callable(names.get(FUNCTION)):
            names[FUNCTION] = patch(names[FUNCTION])
    except Exception as error:  # the script runs as if we were not installed
        _say(f"cannot patch {module.__file__}: {error!r}")


def _say(text: str) -> None:
    import logging

    logging.getLogger(__name__).warning("sglang-moe-ext %s", text)


def install() -> None:
    """Wait from now on; SGLANG_MOE_EXT_DISABLE=1 keeps us out."""
    if env.is_on(env.DISABLE):
        return
    import_hook.on_import(MODULE, _patch)
    for name in LAYER_MODULES:
        import_hook.on_import(name, _attach)
