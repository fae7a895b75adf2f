"""Every environment variable that this package reads, in one table.

Each Python process of an environment imports this through the startup file, so it imports nothing but `os`.
"""

import os

DISABLE = "SGLANG_MOE_EXT_DISABLE"
KERNELS = "SGLANG_MOE_EXT_KERNELS"
STORE = "SGLANG_MOE_EXT_STORE"
CAPTURE = "SGLANG_MOE_EXT_CAPTURE"
AUTOTUNE = "SGLANG_MOE_EXT_AUTOTUNE"
SGLANG_CONFIG_DIR = "SGLANG_MOE_CONFIG_DIR"
VLLM_CONFIG_FOLDER = "VLLM_TUNED_CONFIG_FOLDER"
SGLANG_PLUGINS = "SGLANG_PLUGINS"
VLLM_PLUGINS = "VLLM_PLUGINS"
COMPLETION = "_ARGCOMPLETE"
HUB_OFFLINE = "HF_HUB_OFFLINE"
SGLANG_AITER = "SGLANG_USE_AITER"
VLLM_AITER = "VLLM_ROCM_USE_AITER"

MEANINGS = {
    DISABLE: "`1`: nothing of this package runs in a server, nor in the engines' tuning scripts",
    KERNELS: "`0`: a server runs the engine's kernels alone; tables and the guard stay active",
    STORE: "your own store of tables, instead of `~/.local/share/sglang_moe_ext`",
    CAPTURE: "`DIR[:max_files][:min_tokens]`: an SGLang server writes its topk_ids (which experts each token chose) "
    "there, for `tune --topk-ids-dir`",
    AUTOTUNE: "seconds, or `1` for 60: a server that starts with a layer without a measured table tunes it for about "
    "so long, before it loads the weights",
    SGLANG_CONFIG_DIR: "SGLang's own: it reads tables from this folder alone, and `tune` writes there where it is set",
    VLLM_CONFIG_FOLDER: "vLLM's own: it reads tables from this folder first, and `tune` writes there where it is set",
    SGLANG_PLUGINS: "SGLang's own list of plugins to load; one without `sglang_moe_ext` keeps this package out",
    VLLM_PLUGINS: "vLLM's own list of plugins to load; one without `sglang_moe_ext` keeps this package out",
    HUB_OFFLINE: "the Hugging Face hub's own: `1` keeps every command from asking it for a model's configuration",
    COMPLETION: "set by the shell alone, while it asks for completions",
    SGLANG_AITER: "SGLang's own, for AMD GPUs: where it is on, AITER runs the experts and no table is read; `doctor` "
    "and `tune` say so",
    VLLM_AITER: "vLLM's own, for AMD GPUs: the same",
}
"""What each variable does, as the README's table states it."""


def is_on(name: str) -> bool:
    """Whether a switch is set to anything but 0."""
    return os.environ.get(name, "0").lower() not in ("", "0", "false")
