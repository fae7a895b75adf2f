"""The real vLLM's function by which a worker loads a model, with our hook: which flags of tune its config becomes.

Only the GPU and the weights are stood for: the worker is an object with what the real one has before it loads.
"""

import importlib
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch

from sglang_moe_ext.engines.vllm import model_loading
from sglang_moe_ext.serving import autotune, plugin

asked = json.load(sys.stdin)
plugin.register_vllm()
module = importlib.import_module(model_loading.MODULE)
found: list[Any] = []
torch.cuda.device_count = lambda: 8
torch.cuda.get_device_name = lambda *_: "NVIDIA H200"
autotune.before_load = lambda engine, layer: found.append(layer())
from vllm.config import CompilationConfig, EPLBConfig, ParallelConfig  # noqa: E402

parallel = ParallelConfig()
for name, value in asked["parallel"].items():
    if not hasattr(parallel, name):
        raise AssertionError(f"ParallelConfig has no {name}")
    object.__setattr__(parallel, name, value)
parallel.eplb_config = EPLBConfig(num_redundant_experts=asked["redundant"])
compilation = CompilationConfig()
compilation.cudagraph_capture_sizes = asked["graphs"]
config = SimpleNamespace(
    parallel_config=parallel,
    compilation_config=compilation,
    scheduler_config=SimpleNamespace(max_num_batched_tokens=asked["chunk"]),
    model_config=SimpleNamespace(model="m", trust_remote_code=False, **asked["model"], hf_config=SimpleNamespace()),
)
worker = SimpleNamespace(vllm_config=config, device=torch.device("cuda:3"), rank=1)
try:
    module.Worker.load_model(worker)
    went_on = "loaded"
except AttributeError as error:  # the engine's own function was reached, and wants a real worker
    went_on = str(error)
if not found:
    raise AssertionError(f"the hook did not run: {went_on}")
layer = found[0]
print(json.dumps({"flags": layer.flags, "tokens": layer.tokens, "gpus": layer.gpus, "went_on": went_on}))
