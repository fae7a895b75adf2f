"""Child of test_runner_hook: the MoE runner of the SGLang on PYTHONPATH, watched as a server has it watched.

stdin: {"folder", "ids", "ep_size"}. Last line of stdout: {"obstacle", "again", "returned", "compiled", "said": {name of
a scene: what was logged}, "taken": {name of a scene: how many batches}}; the files of each lie in a folder of its name.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sglang_moe_ext.engines.sglang import routing_hook
from sglang_moe_ext.serving import capture

EXPERTS = 16
LAYER = 3
PATIENCE_S = 30.0
_PARALLEL = "sglang.srt.distributed.parallel_state"


def a_runner(module: Any, local_experts: int = EXPERTS) -> Any:
    """One whose layer is computed by nobody: it returns what it is given."""
    runner = object.__new__(module.MoeRunner)
    base = importlib.import_module("sglang.srt.layers.moe.moe_runner.base")
    runner.config = base.MoeRunnerConfig(
        num_experts=EXPERTS, num_local_experts=local_experts, layer_id=LAYER, num_fused_shared_experts=1
    )
    runner.lora_enabled = False
    runner.fused_func = lambda dispatched, quant_info, config: (dispatched, quant_info, config)
    return runner


def dispatched(ids: list[list[int]]) -> Any:
    """What the engine's own dispatcher hands on."""
    topk = importlib.import_module("sglang.srt.layers.moe.topk")
    standard = importlib.import_module("sglang.srt.layers.moe.token_dispatcher.standard")
    tensor = torch.tensor(ids, dtype=torch.int32)
    chosen = topk.StandardTopKOutput(torch.ones(tensor.shape), tensor, torch.zeros(len(ids), EXPERTS))
    known = {"hidden_states": torch.zeros(len(ids), 8), "topk_output": chosen, "hidden_states_scale": None}
    fields = standard.StandardDispatchOutput._fields
    return standard.StandardDispatchOutput(**{name: known[name] for name in fields if name in known})


def as_rank(rank: int) -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(importlib.import_module(_PARALLEL), "get_tensor_model_parallel_rank", lambda: rank)


@contextlib.contextmanager
def warming_up() -> Iterator[None]:
    """As the engine marks it; what of the engine marks it otherwise, or needs a GPU to be imported, is not asked."""
    entered = 0
    with contextlib.ExitStack() as stack:
        for name, function in routing_hook._GRAPHS:
            with contextlib.suppress(ImportError):
                module: Any = importlib.import_module(name)
                if function == "get_is_capture_mode" and hasattr(module, "model_capture_mode"):
                    stack.enter_context(module.model_capture_mode())
                    entered += 1
        assert entered, "this engine says in none of these places that it warms up"
        yield


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def scene(module: Any, folder: Path, act: Callable[[], None]) -> tuple[list[str], int]:
    """(what was logged, how many batches were taken) while a server that captures there did that."""
    said, log = Said(), logging.getLogger("sglang_moe_ext")
    log.addHandler(said)
    stock = module.MoeRunner.run
    try:
        with mock.patch.object(capture.Recorder, "take", autospec=True, side_effect=capture.Recorder.take) as taken:
            assert capture.install(module, capture.CaptureRequest(folder))
            act()
    finally:
        module.MoeRunner.run = stock
        log.removeHandler(said)
    return said.lines, taken.call_count


def wait_for_a_file(folder: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not list(folder.glob("*.safetensors")) and time.monotonic() < end:
        time.sleep(0.02)


def main(request: dict[str, Any]) -> dict[str, Any]:
    module: Any = importlib.import_module(routing_hook.MODULE)
    folder, given = Path(request["folder"]), dispatched(request["ids"])
    answer: dict[str, Any] = {"obstacle": routing_hook.obstacle(module)}

    def plain() -> None:
        watched = module.MoeRunner.run
        answer["again"] = capture.install(module, capture.CaptureRequest(folder)) and module.MoeRunner.run is watched
        runner = a_runner(module)
        returned = runner.run(given, quant_info="weights")
        answer["returned"] = returned[0] is given and returned[1:] == ("weights", runner.config)
        wait_for_a_file(folder / "plain")

    def two_ranks() -> None:
        for _ in range(2):
            a_runner(module, EXPERTS // 2).run(given, "weights")

    def second_rank() -> None:
        with as_rank(1):
            a_runner(module).run(given, "weights")

    def graph() -> None:
        with warming_up():
            a_runner(module).run(given, "weights")

    def compiled() -> None:
        runner = a_runner(module)
        runner.fused_func = lambda dispatched, quant_info, config: dispatched.topk_output.topk_ids + quant_info
        run = torch.compile(runner.run, backend="eager", fullgraph=True)
        answer["compiled"] = run(given, torch.tensor(1)).tolist()

    scenes: dict[str, Callable[[], None]] = {
        "plain": plain,
        "two_ranks": two_ranks,
        "second_rank": second_rank,
        "graph": graph,
        "compiled": compiled,
    }
    played = {name: scene(module, folder / name, act) for name, act in scenes.items()}
    answer["said"] = {name: said for name, (said, _) in played.items()}
    answer["taken"] = {name: taken for name, (_, taken) in played.items()}
    return answer


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
