"""The real SGLang's function that loads a model, with our hook: which flags of tune its settings become.

Only the GPU and the weights are stood for: the runner is an object with what the real one has before it loads.
"""

import importlib
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch

from sglang_moe_ext.engines.sglang import model_loading
from sglang_moe_ext.serving import autotune, plugin

asked = json.load(sys.stdin)
module = importlib.import_module(model_loading.MODULE)
plugin.register_sglang()
found: list[Any] = []
torch.cuda.device_count = lambda: 8
torch.cuda.get_device_name = lambda *_: "NVIDIA H200"
autotune.before_load = lambda engine, layer: found.append(layer())
from sglang.srt.server_args import ServerArgs  # noqa: E402

arguments = SimpleNamespace(**asked["arguments"])
try:
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig
except ImportError:  # up to 0.5.12
    arguments.cuda_graph_bs = asked["graphs"]
else:
    arguments.cuda_graph_config = CudaGraphConfig()
    arguments.cuda_graph_config.decode.bs = asked["graphs"]
runtime = sys.modules.get("sglang.srt.runtime_context")
if hasattr(runtime, "get_schedule"):
    # Published settings win over what the user wrote, as in a server.
    bags: dict[str, Any] = {path.split(".")[0]: SimpleNamespace() for path in model_loading._PATHS.values()}
    for name, path in model_loading._PATHS.items():
        first, *rest = path.split(".")
        bag = bags[first]
        for part in rest:
            vars(bag).setdefault(part, SimpleNamespace())
            bag = getattr(bag, part)
        if hasattr(arguments, name):
            setattr(bag, name, getattr(arguments, name))
    for first, bag in bags.items():
        setattr(runtime, f"get_{first}", lambda bag=bag: bag)
    arguments = SimpleNamespace(tp_size=1, chunked_prefill_size=None)
    from sglang.srt.arg_groups.arg_utils import namespace_of

    wrong = {n: of for n, of in model_loading._PATHS.items() if namespace_of(ServerArgs).get(n) != of}
else:
    fields = ServerArgs.__dataclass_fields__
    wrong = {n: "absent" for n in model_loading._PATHS if n not in fields and n != "cuda_graph_config"}
runner = SimpleNamespace(server_args=arguments, device="cuda", gpu_id=3, is_draft_worker=False)
try:
    module.ModelRunner.load_model(runner)
    went_on = "loaded"
except Exception as error:
    went_on = repr(error)  # the engine's own function was reached, and wants a real runner
if not found:
    raise AssertionError(f"the hook did not run: {went_on}")
layer = found[0]
print(
    json.dumps({"flags": layer.flags, "tokens": layer.tokens, "gpus": layer.gpus, "wrong": wrong, "went_on": went_on})
)
