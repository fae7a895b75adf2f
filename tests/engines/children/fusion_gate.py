"""Child of test_sglang_fusion: asks the SGLang on PYTHONPATH how many shared experts it would fuse on an sm_90 GPU.

stdin: {"cases": {name: {"module", "ep", "config": <config.json>}}, "unknown_model_types": [...], "absent_packages":
[...]}: model types unknown to the transformers that this SGLang pins, packages that its models import and no gate uses.
Last line of stdout: {"fused": {name: number}, "unimportable": {module: error}}.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from sglang.srt import server_args as server_args_module
from sglang.srt.layers.moe import utils as moe_utils
from sglang.srt.utils.hf_transformers_utils import get_config, get_hf_text_config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# What the wrappers build inside: module and class, and the part of the config it is given (none: all of it).
LANGUAGE_MODELS = {
    "KimiVLForConditionalGeneration": ("deepseek_v2", "DeepseekV2ForCausalLM", "text_config"),
    "KimiK25ForConditionalGeneration": ("deepseek_v2", "DeepseekV3ForCausalLM", "text_config"),
    "DeepseekVL2ForCausalLM": ("deepseek_v2", "DeepseekV2ForCausalLM", "language_config"),
    "DotsVLMForCausalLM": ("deepseek_v2", "DeepseekV2ForCausalLM", "language_config"),
    "Dots3NoteForCausalLM": ("dots3_common.modeling", "Dots3LanguageModelForCausalLM", None),
}
# Models that decide in a layer's constructor: decoder layer, and the attention that is built before the decision.
DECIDING_LAYERS = {
    "Qwen3NextForCausalLM": ("Qwen3HybridLinearDecoderLayer", "Qwen3GatedDeltaNet"),
    "Qwen3_5MoeForConditionalGeneration": ("Qwen3_5LinearDecoderLayer", "Qwen3_5GatedDeltaNet"),
}


class AbsentPackages(MetaPathFinder, Loader):
    """Serves a stand-in for each module of packages that exist only beside a GPU."""

    def __init__(self, packages: list[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".", maxsplit=1)[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(name=spec.name)

    def exec_module(self, module: Any) -> None:
        pass


class Decided(Exception):
    """The MoE block has reached its router: the number of fused experts stands."""


@functools.cache
def default_server_args() -> Any:
    return server_args_module.ServerArgs(model_path="dummy", device="cpu")


def publish_default_flags() -> None:
    """Default server flags, and no decision of a case before."""
    with contextlib.suppress(ImportError):
        importlib.import_module("sglang.srt.runtime_context").reset_context()
    server_args_module.set_global_server_args_for_scheduler(copy.copy(default_server_args()))


@contextlib.contextmanager
def expert_parallel(ep: int) -> Iterator[None]:
    """A world of `ep` ranks that all split by expert."""
    try:
        get_parallel = importlib.import_module("sglang.srt.runtime_context").get_parallel
    except ImportError:  # <= 0.5.12 asks the process groups
        groups = importlib.import_module("sglang.srt.distributed.parallel_state")
        for group in ("_TP", "_MOE_EP"):
            setattr(groups, group, SimpleNamespace(world_size=ep, rank_in_group=0))
        yield
    else:
        with get_parallel().override(tp_size=ep, attn_tp_size=ep, moe_ep_size=ep, moe_tp_size=1):
            yield


def pretend_hopper() -> None:
    """What the loaded model modules found out about the device on import, replaced by sm_90 CUDA."""
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    for name, module in list(sys.modules.items()):
        if name.startswith("sglang.srt.models."):
            for fact, value in (("_is_cuda", True), ("_device_sm", 90)):
                if hasattr(module, fact):
                    setattr(module, fact, value)


def read_config(config: dict[str, Any]) -> Any:
    """config.json as this engine reads it: renamed, flattened, nested."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        parsed = get_config(folder, trust_remote_code=False)
    get_hf_text_config(parsed)  # as ModelConfig does: turns nested dicts into configs
    parsed.encoder_only = False  # as ModelConfig does
    return parsed


def entry_class(module: ModuleType, architecture: str) -> Any:
    entries = module.EntryClass if isinstance(module.EntryClass, list) else [module.EntryClass]
    return next(entry for entry in entries if entry.__name__ == architecture)


def unbuilt(model_class: Any, config: Any) -> Any:
    """An instance that its constructor never saw: enough for a method that reads the config only."""
    model = object.__new__(model_class)
    model.__dict__.update(config=config, quant_config=None, num_fused_shared_experts=0)
    return model


def decided_by_layer(module: ModuleType, config: Any) -> int:
    """Builds the decoder layer up to the router of its MoE block."""
    layer_name, attention_name = DECIDING_LAYERS[config.architectures[0]]
    block_name = "Qwen2MoeSparseMoeBlock"
    block_module = importlib.import_module("sglang.srt.models.qwen2_moe")
    blocks: list[Any] = []

    class WatchedBlock(block_module.Qwen2MoeSparseMoeBlock):  # type: ignore[name-defined,misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            blocks.append(self)
            super().__init__(*args, **kwargs)

    def router(*args: Any, **kwargs: Any) -> None:
        raise Decided

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    replacements = (
        (block_module, "TopK", router),
        (module, block_name, WatchedBlock),
        (module, attention_name, nothing),
    )
    for holder, name, replacement in replacements:
        setattr(holder, name, replacement)
    with contextlib.suppress(Decided):
        getattr(module, layer_name)(getattr(config, "text_config", config), 0)
        raise AssertionError(f"{layer_name} was built without a {block_name}")
    return int(getattr(blocks[0], "num_fused_shared_experts", 0))


def decided_by_model(model_class: Any, config: Any) -> int:
    """The gate of the model class, through the loader's own entry where the engine has one."""
    if hasattr(moe_utils, "resolve_shared_experts_config"):  # 0.5.23
        return int(moe_utils.resolve_shared_experts_config(model_class, config, None).num_fused_shared_experts)
    if hasattr(moe_utils, "install_shared_experts_fusion_decision"):  # 0.5.18, 0.5.20
        moe_utils.install_shared_experts_fusion_decision(model_class, config, None)
    if model_class.__name__ in LANGUAGE_MODELS:
        module_name, class_name, part = LANGUAGE_MODELS[model_class.__name__]
        model_class = getattr(importlib.import_module(f"sglang.srt.models.{module_name}"), class_name)
        config = getattr(config, part) if part else config
    determine = getattr(model_class, "determine_num_fused_shared_experts", None) or getattr(
        model_class, "_determine_num_fused_shared_experts", None
    )
    if determine is None:
        gated = hasattr(model_class, "shared_experts_fusion_disable_reason")
        if gated and not moe_utils.is_shared_experts_fusion_disabled():
            raise AssertionError(f"the gate of {model_class.__name__} is open, and the count is made in another class")
        return 0
    model = unbuilt(model_class, config)
    determine(model)
    return int(model.num_fused_shared_experts)


def answer(module: ModuleType, config: dict[str, Any], ep: int) -> int:
    parsed = read_config(config)
    publish_default_flags()
    with expert_parallel(ep):
        if parsed.architectures[0] in DECIDING_LAYERS:
            return decided_by_layer(module, parsed)
        return decided_by_model(entry_class(module, parsed.architectures[0]), parsed)


def main(request: dict[str, Any]) -> dict[str, Any]:
    for model_type in request["unknown_model_types"]:
        CONFIG_MAPPING._mapping.pop(model_type, None)
    sys.meta_path.append(AbsentPackages(request["absent_packages"]))
    modules: dict[str, ModuleType] = {}
    unimportable: dict[str, str] = {}
    for name in sorted({case["module"] for case in request["cases"].values()}):
        try:
            modules[name] = importlib.import_module(f"sglang.srt.models.{name}")
        except ImportError as error:
            unimportable[name] = str(error)
    pretend_hopper()
    fused = {
        name: answer(modules[case["module"]], case["config"], case["ep"])
        for name, case in request["cases"].items()
        if case["module"] in modules
    }
    return {"fused": fused, "unimportable": unimportable}


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
