"""A model held by the engine's own ModelRunner, with what SGLang's bench_one_batch does with it (sglang 0.5.15)."""

from __future__ import annotations

import importlib
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.serving import dummy_weights
from benchmarks.serving.cases import DECODE_CONTEXT, STEPS
from sglang_moe_ext.engines.sglang.installation import SglangInstallation

if TYPE_CHECKING:
    import numpy

BENCH = "sglang.benchmark.one_batch"
_COMPARED = (32, 128)
"""Requests, and tokens of each, whose next-token logits are compared."""
_FIXED_TOKEN = 17
"""What every compared request decodes: its own choice may differ between children, and so would all that follows."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is loaded. `most_tokens`: of the KV cache; `decode_batches`: to capture CUDA graphs for, none: no graphs."""

    folder: str
    weights: str
    most_tokens: int
    decode_batches: tuple[int, ...]
    largest_batch: int


class ServedModel:
    """Loads in a minute; one case at a time is alive in its KV cache."""

    def __init__(self, engine: SglangInstallation, plan: Plan) -> None:
        self._engine = engine
        self._bench = importlib.import_module(BENCH)
        arguments = _server_arguments(self._bench, plan)
        self._bench._set_envs_and_config(arguments)
        self._bench.initialize_moe_config(arguments)
        self._bench.initialize_fp8_gemm_config(arguments)
        self._bench.initialize_fp4_gemm_config(arguments)
        if plan.weights == "spread":
            dummy_weights.put_in_place()
        ports = self._bench.PortArgs.init_new(arguments)
        self._runner, _ = self._bench.load_model(arguments, ports, 0, 0)
        self._decoding: tuple[int, Any, Any] | None = None

    @property
    def has_decode_graphs(self) -> bool:
        """True where a decode step of the batches asked for replays a CUDA graph."""
        runner = self._runner.torch_runner
        graphs = runner.decode_cuda_graph_runner
        return graphs is not None and graphs is not runner.eager_runner

    def _extend(self, requests: int, tokens: int, seed: int) -> tuple[float, Any, Any, Any]:
        """Of a prefill: milliseconds, the chosen tokens, the logits [requests, vocabulary] and the batch."""
        import numpy as np

        self._decoding = None
        np.random.seed(seed)  # the engine's function draws the tokens from there
        prompts = self._bench.prepare_synthetic_inputs_for_latency_test(requests, tokens)
        self._runner.clear()
        self._runner.synchronize()
        begun = time.perf_counter()
        chosen, logits, batch = self._runner.extend(prompts)
        self._runner.synchronize()
        return (time.perf_counter() - begun) * 1e3, chosen, logits, batch

    def prefill_ms(self, tokens: int, seed: int) -> float:
        """Of one prompt."""
        return self._extend(1, tokens, seed)[0]

    def decode_ms(self, requests: int) -> float:
        """The median of STEPS steps of a batch that goes on from call to call."""
        if self._decoding is None or self._decoding[0] != requests:
            _, chosen, _, batch = self._extend(requests, DECODE_CONTEXT, seed=0)
            self._decoding = (requests, chosen, batch)
        _, chosen, batch = self._decoding
        taken = []
        for _ in range(STEPS):
            self._runner.synchronize()
            begun = time.perf_counter()
            chosen, _ = self._runner.decode(chosen, batch)
            self._runner.synchronize()
            taken.append((time.perf_counter() - begun) * 1e3)
        self._decoding = (requests, chosen, batch)
        return statistics.median(taken)

    def logits(self, tile: dict[str, int] | None) -> tuple[numpy.ndarray, numpy.ndarray, list[list[int]]]:
        """[requests, vocabulary] float32 after a prefill, and after a decode step; the pairs of each expert, by layer.

        `tile`: what the engine shall run in the prefill instead of what its lookup finds.
        """
        requests, tokens = _COMPARED
        tools = importlib.import_module(self._engine.config_module.rpartition(".")[0])
        layer: Any = importlib.import_module(self._engine.layer_module)
        align, pairs = layer.moe_align_block_size, []

        def counting(topk_ids: Any, block_m: int, experts: int) -> Any:
            ids = topk_ids.flatten()
            pairs.append(ids[ids >= 0].bincount(minlength=experts).tolist())
            return align(topk_ids, block_m, experts)

        layer.moe_align_block_size = counting
        try:
            with tools.override_config(tile) if tile else nullcontext():
                _, chosen, logits, batch = self._extend(requests, tokens, seed=1)
        finally:
            layer.moe_align_block_size = align
        prefilled = logits.float().cpu().numpy()
        _, stepped = self._runner.decode(chosen.new_full(chosen.shape, _FIXED_TOKEN), batch)
        return prefilled, stepped.float().cpu().numpy(), pairs


def _server_arguments(bench: Any, plan: Plan) -> Any:
    """As a server of dummy weights has them; prefill without CUDA graphs, which none has for prompts this long."""
    return bench.ServerArgs(
        model_path=plan.folder,
        load_format="dummy",
        attention_backend="triton",
        sampling_backend="pytorch",
        grammar_backend="none",
        moe_runner_backend="triton",
        mem_fraction_static=0.6,
        max_total_tokens=plan.most_tokens,
        max_running_requests=plan.largest_batch,
        cuda_graph_bs_decode=list(plan.decode_batches) or None,
        disable_decode_cuda_graph=not plan.decode_batches,
        disable_prefill_cuda_graph=True,
        random_seed=0,
        log_level="info",
    )
