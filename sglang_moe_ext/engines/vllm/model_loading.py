"""Where a worker of vLLM loads a model, and what it knows of it then: its config, this rank's GPU, no weights yet."""

from __future__ import annotations

from typing import Any

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.starting_layer import StartingLayer, choose_batch_sizes, group_gpus

MODULE, CLASS, FUNCTION = "vllm.v1.worker.gpu_worker", "Worker", "load_model"
"""In all releases from 0.20 to 0.33. The MoE layer's constructor has another signature in each of them; the memory that
is free for the KV cache is measured behind this function."""
_FLAG_OF_TRITON = "moe_wna16"


def starting_layer(worker: Any) -> StartingLayer:
    """The model that this worker is about to load.

    Raises:
        EngineError: there is no GPU to tune on.
    """
    config = worker.vllm_config
    if worker.device.type != "cuda":
        raise EngineError(f"there is no NVIDIA GPU to tune on, the server runs on {worker.device.type}")
    model, parallel = config.model_config, config.parallel_config
    # Experts are split over all ranks of the attention's data parallelism as well.
    ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
    ranks *= getattr(parallel, "prefill_context_parallel_size", 1)
    flags = ["--engine", "vllm", "--model", str(model.model), "--tp-size", str(ranks)]
    flags += ["--enable-expert-parallel"] if parallel.enable_expert_parallel else []
    flags += ["--trust-remote-code"] if model.trust_remote_code else []
    flags += _quantization(model)
    if parallel.enable_eplb and (redundant := parallel.eplb_config.num_redundant_experts):
        flags += ["--ep-num-redundant-experts", str(redundant)]
    return StartingLayer(tuple(flags), _tokens(config), *_gpus(worker), str(model.model))


def _quantization(model: Any) -> list[str]:
    """The user's --quantization; the engine puts the checkpoint's own method into the same field."""
    stored = getattr(model.hf_config, "quantization_config", None) or getattr(
        model.hf_config, "compression_config", None
    )
    name = model.quantization
    return ["--quantization", str(name)] if name and (not stored or name == _FLAG_OF_TRITON) else []


def _tokens(config: Any) -> tuple[int, ...]:
    parallel = config.parallel_config
    gathered = parallel.data_parallel_size if parallel.enable_expert_parallel else 1
    graphs = config.compilation_config.cudagraph_capture_sizes or ()  # numbers of tokens, drafts included
    return choose_batch_sizes(
        (size * gathered for size in graphs), config.scheduler_config.max_num_batched_tokens * gathered
    )


def _gpus(worker: Any) -> tuple[tuple[int, ...], str]:
    """The GPUs of this worker's tensor-parallel group, where one machine has them all."""
    import torch

    parallel, own = worker.vllm_config.parallel_config, worker.device.index or 0
    size = parallel.tensor_parallel_size
    base, ranks = own - worker.rank % size, size if parallel.nnodes == 1 else 1
    gpus = group_gpus(own, base, 1, ranks, torch.cuda.device_count()) if base >= 0 else (own,)
    return gpus, torch.cuda.get_device_name(own)
