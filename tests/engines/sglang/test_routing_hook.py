"""What the capture believes of SGLang's MoE runner, against each real one, without a GPU."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.numpy import load_file

from sglang_moe_ext.engines.sglang import routing_hook
from tests.engines.installed import HOOKED_VERSIONS, run_in_engine

CHILD = Path(__file__).parents[1] / "children" / "runner_hook.py"
VERSIONS = HOOKED_VERSIONS
IDS = [[3, 15], [-1, -1], [0, 7], [-1, 15]]
"""A batch of two tokens, padded to four; the shared expert of a padded row may be there."""


@functools.cache
def watched(version: str) -> tuple[Path, dict[str, Any]]:
    """(the folder with a folder of each scene, what the child says)."""
    folder = Path(tempfile.mkdtemp(prefix="runner_hook_"))
    return folder, run_in_engine(version, CHILD, {"folder": str(folder), "ids": IDS})


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/*"))


@pytest.mark.parametrize("version", VERSIONS)
class TestEachEngine:
    def test_the_runner_is_as_we_know_it(self, version: str) -> None:
        assert watched(version)[1]["obstacle"] is None

    def test_a_layer_returns_what_it_returned(self, version: str) -> None:
        assert watched(version)[1]["returned"]

    def test_the_ids_of_a_batch_are_written_without_its_padding(self, version: str) -> None:
        [file] = files(watched(version)[0] / "plain")
        assert load_file(file)["topk_ids"].tolist() == [[3, 15], [0, 7]]

    def test_the_name_tells_the_layer(self, version: str) -> None:
        [file] = files(watched(version)[0] / "plain")
        assert file.name.startswith("topk_ids_layer3_idx0_")

    def test_a_second_installation_changes_nothing(self, version: str) -> None:
        assert watched(version)[1]["again"]

    def test_ids_of_one_rank_of_two_are_refused_in_one_line(self, version: str) -> None:
        answer = watched(version)[1]
        assert answer["taken"]["two_ranks"] == 0
        [line] = answer["said"]["two_ranks"]
        assert "--enable-return-routed-experts" in line

    def test_the_second_rank_takes_nothing_and_says_nothing(self, version: str) -> None:
        answer = watched(version)[1]
        assert (answer["taken"]["second_rank"], answer["said"]["second_rank"]) == (0, [])

    def test_what_warms_a_graph_up_is_left_out(self, version: str) -> None:
        assert watched(version)[1]["taken"]["graph"] == 0

    def test_torch_traces_the_watched_layer_as_one_graph(self, version: str) -> None:
        assert watched(version)[1]["compiled"] == [[number + 1 for number in row] for row in IDS]


def module_with(**members: object) -> ModuleType:
    module = ModuleType("moved")
    vars(module).update(members)
    return module


def test_a_module_without_the_runner_is_an_obstacle() -> None:
    assert routing_hook.obstacle(module_with()) == "moved has no MoeRunner.run"


def test_a_runner_that_takes_something_else_is_an_obstacle() -> None:
    class MoeRunner:
        def run(self, hidden_states: object, dispatch_output: object) -> None: ...

    said = routing_hook.obstacle(module_with(MoeRunner=MoeRunner))
    assert said == (
        "MoeRunner.run takes self, hidden_states, dispatch_output: expected self, dispatch_output, quant_info first"
    )


def test_a_runner_that_inherits_its_run_is_an_obstacle() -> None:
    class Base:
        def run(self, dispatch_output: object, quant_info: object) -> None: ...

    assert routing_hook.obstacle(module_with(MoeRunner=type("MoeRunner", (Base,), {}))) is not None
