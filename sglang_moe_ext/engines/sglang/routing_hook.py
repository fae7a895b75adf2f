"""Copies the topk_ids of every MoE layer of SGLang without holding up the layer.

`MoeRunner.run(dispatch_output, quant_info)` of srt/layers/moe/moe_runner/runner.py, in every release from 0.5.5 to
0.5.23; `lora_info` came after those two with 0.5.10. `dispatch_output.topk_output.topk_ids` is [tokens, top_k] there,
the fused shared experts after the routed, -1 in rows that pad a batch. With expert parallelism the standard dispatcher
(token_dispatcher/standard.py) has already mapped the ids to this rank's experts, so the others' are lost.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MODULE = "sglang.srt.layers.moe.moe_runner.runner"
UNSEEN = (
    "what replays a CUDA graph is not seen: start the server with --disable-cuda-graph, "
    "and 0.5.10 to 0.5.14 with --disable-piecewise-cuda-graph too"
)
_CLASS, _METHOD = "MoeRunner", "run"
_FIRST_PARAMETERS = ("self", "dispatch_output", "quant_info")
_MARK = "watched_by_sglang_moe_ext"
_GRAPHS = (
    ("sglang.srt.model_executor.runner_utils.capture_mode", "get_is_capture_mode"),  # 0.5.15 and newer
    ("sglang.srt.model_executor.cuda_graph_runner", "get_is_capture_mode"),
    ("sglang.srt.model_executor.piecewise_cuda_graph_runner", "get_is_capture_mode"),
    ("sglang.srt.compilation.piecewise_context_manager", "is_in_piecewise_cuda_graph"),
)
"""Functions that say whether the engine warms up or captures a graph: those tokens belong to no request."""
_PAUSE_S = 0.05
_PARALLEL_STATE = "sglang.srt.distributed.parallel_state"


@dataclass(frozen=True, slots=True)
class RoutingBatch:
    """One layer's ids on their way to host memory; `copied` is recorded when they are there, None: they already are.

    The last `fused_shared` of each row are shared experts, which a row of padding has as well.
    """

    layer: int
    ids: torch.Tensor
    copied: torch.cuda.Event | None
    fused_shared: int = 0

    @property
    def size_bytes(self) -> int:
        return self.ids.numel() * self.ids.element_size()

    def rows(self) -> tuple[int, bytes]:
        """(experts a token, int32 ids of the rows with work). Waits for the copy, and for nothing else.

        A row whose routed experts are all -1 pads a batch; among others, -1 stands for a choice without weights
        (LongCat's zero experts).
        """
        import torch

        if self.copied is not None:
            while _is_making_graphs():  # a wait in any thread spoils the graph that another captures
                time.sleep(_PAUSE_S)
            self.copied.synchronize()
        routed = self.ids[:, : self.ids.shape[1] - self.fused_shared]
        ids = self.ids[(routed >= 0).any(dim=1)].to(torch.int32).contiguous()
        return ids.shape[1], ids.numpy().tobytes()


class RoutingWatcher(Protocol):
    """Receives the batches, in the thread that launches the model."""

    def wants(self, rows: int, size_bytes: int) -> bool: ...

    def take(self, batch: RoutingBatch) -> None: ...

    def stop(self, why: str) -> None: ...


def obstacle(runner_module: ModuleType) -> str | None:
    """Why the module cannot be watched, or None."""
    run = vars(getattr(runner_module, _CLASS, object)).get(_METHOD)
    if not inspect.isfunction(run):
        return f"{runner_module.__name__} has no {_CLASS}.{_METHOD}"
    parameters = tuple(inspect.signature(run).parameters)
    if parameters[:3] != _FIRST_PARAMETERS:
        return f"{_CLASS}.{_METHOD} takes {', '.join(parameters)}: expected {', '.join(_FIRST_PARAMETERS)} first"
    return None


def is_watched(runner_module: ModuleType) -> bool:
    """True where `watch` has already wrapped the module."""
    return hasattr(vars(getattr(runner_module, _CLASS)).get(_METHOD), _MARK)


def watch(runner_module: ModuleType, watcher: RoutingWatcher) -> None:
    """Tell the watcher of every batch that an MoE layer runs in eager mode. Call `obstacle` first."""
    runner = getattr(runner_module, _CLASS)
    setattr(runner, _METHOD, _wrap_run(getattr(runner, _METHOD), _observer(watcher)))


def _wrap_run(run: Callable[..., Any], observe: Callable[[Any, Any], None]) -> Callable[..., Any]:
    import torch

    is_compiling = torch.compiler.is_compiling

    @functools.wraps(run)
    def run_watched(self: Any, dispatch_output: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_compiling():  # what is traced would break the graph, and see no ids
            observe(self, dispatch_output)
        return run(self, dispatch_output, *args, **kwargs)

    setattr(run_watched, _MARK, True)
    return run_watched


def _observer(watcher: RoutingWatcher) -> Callable[[Any, Any], None]:
    is_first_rank = functools.cache(_is_first_rank)

    def observe(runner: Any, dispatch_output: Any) -> None:
        try:
            ids = getattr(getattr(dispatch_output, "topk_output", None), "topk_ids", None)
            # A format without ids, as that of OpenAI's Triton kernels and DeepEP's, is no error.
            if ids is None or ids.dim() != 2 or not watcher.wants(ids.shape[0], ids.numel() * ids.element_size()):
                return
            if not is_first_rank():
                watcher.stop("")
                return
            config = runner.config
            if config.num_experts != config.num_local_experts:
                watcher.stop(
                    "with expert parallelism a rank sees the ids of its own experts alone; "
                    "use sglang-moe-ext capture --url, with --enable-return-routed-experts on the server"
                )
                return
            if config.layer_id is not None and not _is_warming_up(ids):
                watcher.take(_copy_ids(config.layer_id, ids, getattr(config, "num_fused_shared_experts", None) or 0))
        except Exception as error:
            watcher.stop(f"{type(error).__name__}: {error}")

    return observe


def _is_first_rank() -> bool:
    """True on the first tensor-parallel rank, and where the engine cannot say: it has one process then."""
    state = sys.modules.get(_PARALLEL_STATE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of 0.5.23, which keeps the function
            return state is None or state.get_tensor_model_parallel_rank() == 0
    except (AttributeError, AssertionError, RuntimeError):  # the last: 0.5.23
        return True


def _is_warming_up(ids: torch.Tensor) -> bool:
    """True while a CUDA graph is captured or warmed up."""
    import torch

    return _is_making_graphs() or (ids.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_making_graphs() -> bool:
    known = (getattr(sys.modules.get(module), name, None) for module, name in _GRAPHS)
    return any(says() for says in known if says is not None)


def _copy_ids(layer: int, ids: torch.Tensor, fused_shared: int) -> RoutingBatch:
    """Start a copy to host memory: the layer may change its ids as soon as it runs."""
    import torch

    if not ids.is_cuda:
        return RoutingBatch(layer, ids.detach().to("cpu", copy=True), None, fused_shared)
    # torch keeps pinned blocks for the next batch; an own one for each would be made anew each time.
    host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
    host.copy_(ids.detach(), non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # the thread that waits sleeps
    copied.record()
    return RoutingBatch(layer, host, copied, fused_shared)
