"""Where SGLang loads a model, and what it knows of it then: its arguments, this rank's GPU, no weights yet."""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.starting_layer import StartingLayer, choose_batch_sizes, group_gpus

MODULE, CLASS, FUNCTION = "sglang.srt.model_executor.model_runner", "ModelRunner", "load_model"
"""In all releases from 0.5.5 to 0.5.23. The constructor of the MoE layer knows more, but has another signature in each
release, and runs behind the first layers' weights."""
_RUNTIME = "sglang.srt.runtime_context"
_NAMESPACES = {
    "model": ("model_path", "quantization", "trust_remote_code"),
    "parallel": ("tp_size", "pp_size", "dp_size", "ep_size", "moe_dp_size", "nnodes", "enable_dp_attention"),
    "device": ("base_gpu_id", "gpu_id_step"),
    "schedule": ("chunked_prefill_size", "max_prefill_tokens"),
    "spec": ("speculative_num_draft_tokens",),
    "exec.graph": ("cuda_graph_config",),
    "exec.moe": ("moe_runner_backend", "moe_a2a_backend", "ep_num_redundant_experts", "disable_shared_experts_fusion"),
    "exec.deterministic": ("enable_deterministic_inference",),
}
"""Since 0.5.18 a server's settings stand in these namespaces, and its arguments are what the user wrote."""
_PATHS = {name: path for path, names in _NAMESPACES.items() for name in names}
_RUNS_TRITON = ("auto", "triton")
DEVICE = "cuda"
"""What a rank that can be tuned for runs on; the tests of real servers on a CPU name another."""


def starting_layer(runner: Any) -> StartingLayer:
    """The model that this runner is about to load.

    Raises:
        EngineError: no table matters to it, or this release says it in a way that is not known.
    """

    def setting(name: str, default: Any = None) -> Any:
        return _setting(runner.server_args, name, default)

    if why := _why_not(runner, setting):
        raise EngineError(why)
    flags = ["--engine", "sglang", "--model", str(setting("model_path"))]
    numbers = {"--tp-size": "tp_size", "--ep-size": "ep_size", "--ep-num-redundant-experts": "ep_num_redundant_experts"}
    flags += [word for flag, name in numbers.items() if (value := setting(name)) for word in (flag, str(value))]
    if quantization := setting("quantization"):
        flags += ["--quantization", str(quantization)]
    if setting("moe_runner_backend") == "triton":
        flags.append("--served-by-triton")
    for flag in ("disable_shared_experts_fusion", "trust_remote_code"):
        flags += [f"--{flag.replace('_', '-')}"] if setting(flag) else []
    return StartingLayer(tuple(flags), _tokens(setting), *_gpus(runner, setting), str(setting("model_path")))


def _setting(server_args: Any, name: str, default: Any) -> Any:
    runtime = sys.modules.get(_RUNTIME)
    namespace, *inner = _PATHS[name].split(".") if name in _PATHS else ("",)
    if find := getattr(runtime, f"get_{namespace}", None):
        with contextlib.suppress(AttributeError, ValueError, RuntimeError, AssertionError):  # it is not published
            return getattr(functools.reduce(getattr, inner, find()), name)
    return getattr(server_args, name, default)


def _why_not(runner: Any, setting: Any) -> str | None:
    device, backend = str(runner.device), setting("moe_runner_backend", "auto")
    exchange, data_parallel = setting("moe_a2a_backend"), setting("moe_dp_size")
    whys = {
        "a draft model is not tuned": runner.is_draft_worker,
        f"there is no NVIDIA GPU to tune on, the server runs on {device}": device != DEVICE,
        "deterministic inference reads no table": setting("enable_deterministic_inference"),
        f"--moe-runner-backend {backend} reads no table": backend not in _RUNS_TRITON,
        f"--moe-a2a-backend {exchange} is not tuned for": exchange not in (None, "none"),
        f"--moe-dp-size {data_parallel} is not tuned for": data_parallel not in (None, 1),
    }
    return next((why for why, holds in whys.items() if holds), None)


def _tokens(setting: Any) -> tuple[int, ...]:
    graphs = setting("cuda_graph_bs")  # up to 0.5.12
    if (config := setting("cuda_graph_config")) is not None:
        graphs = config.decode.bs
    drafts = setting("speculative_num_draft_tokens") or 1
    # With attention in data parallel, the layer gets the tokens of all of them.
    gathered = (setting("dp_size") or 1) if setting("enable_dp_attention") else 1
    chunk = setting("chunked_prefill_size")
    largest = chunk * gathered if chunk is not None and chunk > 0 else setting("max_prefill_tokens") or 0
    return choose_batch_sizes((size * drafts * gathered for size in graphs or ()), largest)


def _gpus(runner: Any, setting: Any) -> tuple[tuple[int, ...], str]:
    import torch

    own, step = runner.gpu_id, setting("gpu_id_step") or 1
    ranks = (setting("tp_size") or 1) // (setting("nnodes") or 1) if setting("pp_size") in (None, 1) else 1
    gpus = group_gpus(own, setting("base_gpu_id") or 0, step, ranks, torch.cuda.device_count())
    return gpus, torch.cuda.get_device_name(own)
