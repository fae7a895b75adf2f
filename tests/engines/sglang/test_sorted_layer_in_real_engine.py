"""Our path in the place of the kernels of each real engine, interpreted: what it takes over, what it leaves alone."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import triton

from sglang_moe_ext import env
from sglang_moe_ext.core import TileConfig
from sglang_moe_ext.engines.lookup_probe import LookupRequest
from sglang_moe_ext.engines.sglang import lookup_probe, table_names
from sglang_moe_ext.few_tokens_config import DownTile, FewTokensConfig, UpTile
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.kernel_plans import DownConfig, KernelPlan, UpConfig, WarpSpecializedDown, WarpSpecializedUp
from sglang_moe_ext.serving import kernel_selection
from sglang_moe_ext.tables import plan_table
from sglang_moe_ext.tables.plan_table import KernelEntry
from tests.engines.children import own_path as child
from tests.engines.installed import HOOKED_VERSIONS, REPO_ROOT, engine_environment, run_in_engine
from tests.engines.sglang.test_hooks_in_real_engine import WITH_PLUGINS
from tests.tables.generated import A_RUN

pytestmark = pytest.mark.usefixtures("forked_engines")

CHILD = Path(child.__file__)
SHAPES = child.SHAPES
DEVICE = "NVIDIA H200"
PATHS = {
    "16 bits": KernelPlan(UpConfig(16, 64, 64, 1, 4, 2), DownConfig(16, 64, 64, 1, 4, 2)),
    "block": KernelPlan(UpConfig(16, 128, 128, 1, 4, 2), DownConfig(16, 64, 128, 1, 4, 2)),
    "elsewhere": KernelPlan(UpConfig(16, 64, 64, 1, 4, 2), DownConfig(16, 64, 64, 1, 4, 2)),
    "channel": KernelPlan(TileConfig(16, 64, 64, 1, 4, 2), DownConfig(16, 64, 64, 1, 4, 2)),
    "warp-specialized 16 bits": KernelPlan(WarpSpecializedUp(), WarpSpecializedDown()),
    "warp-specialized block": KernelPlan(WarpSpecializedUp(2), WarpSpecializedDown("pair", stages=3)),
    "warp-specialized channel": KernelPlan(WarpSpecializedUp(1, persistent=False), WarpSpecializedDown()),
    "warp-specialized up alone": KernelPlan(WarpSpecializedUp(), DownConfig(64, 64, 128, 1, 4, 2)),
    "warp-specialized down alone": KernelPlan(UpConfig(128, 64, 64, 1, 4, 2), WarpSpecializedDown()),
}
_BYTES = FewTokensConfig(UpTile(8, 32, 128, 4, 2), DownTile(8, 64, 128, 4, 2, split=2))
FEW = {
    "few 16 bits": {
        1: FewTokensConfig(UpTile(1, 64, 128, 4, 2), DownTile(1, 64, 128, 4, 2)),
        2: FewTokensConfig(UpTile(8, 64, 128, 4, 2), DownTile(8, 64, 128, 4, 2, split=2), grouped=True),
        4: FewTokensConfig(UpTile(8, 64, 128, 4, 2), DownTile(8, 64, 128, 4, 2, split=2), grouped=True),
        8: None,
    },
    "few block": {2: _BYTES, 4: _BYTES},
    "few channel": {2: _BYTES, 4: _BYTES},
}
# bf16 rounded a few times; float8 activations besides.
BOUNDS = {"16 bits": 6e-3, "block": 4e-2, "channel": 4e-2}


@functools.cache
def store() -> Path:
    root = Path(tempfile.mkdtemp(prefix="paths_"))
    folder = root / "tables" / "sglang" / table_names.version_folder(triton.__version__)
    for name, shape in child.SHAPES.items():
        run = dataclasses.replace(A_RUN, shape=str(shape))
        table = folder / table_names.file_name(table_names.table_key(shape, DEVICE))
        entries = (
            {m: KernelEntry(plan, run, {"us": 40.0}) for m, plan in FEW[name].items()}
            if name in FEW
            else {
                child.TOKENS // 2: KernelEntry(None, run),
                child.TOKENS: KernelEntry(PATHS[name], run, {"us": kernel_selection.SHORTEST_US}),
            }
        )
        plan_table.put(plan_table.path_beside(table), entries)
    return root


@functools.cache
def said(version: str) -> dict[str, Any]:
    environment = {env.STORE: str(store()), env.DISABLE: "", "SGLANG_PLUGINS": "", "TRITON_INTERPRET": "1"}
    answer: dict[str, Any] = run_in_engine(version, CHILD, {"device": DEVICE}, env=environment)
    return answer


every_version = pytest.mark.parametrize("version", WITH_PLUGINS)
BATCHES = {
    "out of place": "16 bits",
    "in place": "16 bits",
    "scaled": "16 bits",
    "block": "block",
    "channel": "channel",
}


@every_version
@pytest.mark.parametrize("batch", BATCHES)
def test_a_layer_that_the_table_names_runs_our_path_and_runs_it_right(version: str, batch: str) -> None:
    found = said(version)[batch]
    assert found["ours"] == 1
    assert found["error"] < BOUNDS[BATCHES[batch]]


@every_version
@pytest.mark.parametrize("batch", ["experts elsewhere", "experts left out"])
def test_a_layer_with_experts_of_other_ranks_reads_no_stale_row(version: str, batch: str) -> None:
    """Where the sort puts their pairs in front, and where it leaves them out."""
    assert said(version)[batch]["ours"] == 1
    assert said(version)[batch]["error"] < BOUNDS["16 bits"]


@every_version
@pytest.mark.parametrize("experts", ["", ", experts elsewhere"])
@pytest.mark.parametrize("name", [name for name in PATHS if name.startswith("warp-specialized")])
def test_a_warp_specialized_plan_runs_with_what_its_launchers_want(version: str, name: str, experts: str) -> None:
    """The launchers are torch's, since Gluon cannot run on a CPU; the kernels have tests of their own."""
    found = said(version)[name + experts]
    assert found["ours"] == 1
    assert found["error"] < (BOUNDS["block"] if SHAPES[name].quantization.scheme else BOUNDS["16 bits"])


@every_version
def test_both_kernels_of_a_warp_specialized_plan_are_launched(version: str) -> None:
    """Twice to load them, and in two batches."""
    launched = said(version)["launched"]
    plans = [PATHS[name] for name in SHAPES if name.startswith("warp-specialized")]
    wanted = [str(it) for plan in plans for it in 4 * (plan.up, plan.down) if str(it).startswith("warp-specialized")]
    assert launched == wanted


@every_version
def test_fewer_tokens_than_it_was_measured_for_run_the_engines_kernels(version: str) -> None:
    assert said(version)["few tokens"]["ours"] == 0
    assert said(version)["few tokens"]["error"] < BOUNDS["16 bits"]


@every_version
def test_all_kernels_of_a_layer_are_loaded_at_its_first_call_whatever_its_number_of_tokens(version: str) -> None:
    """So that no request with many tokens waits for a compiler."""
    found = said(version)
    assert (found["few tokens"]["loads"], found["out of place"]["loads"]) == (2, 0)
    assert found["few tokens"]["error"] < BOUNDS["16 bits"]


@every_version
def test_a_graph_is_captured_with_our_kernels_only_where_they_are_loaded(version: str) -> None:
    cold, warm = said(version)["captured while cold"], said(version)["captured"]
    assert (cold["ours"], cold["loads"], warm["ours"], warm["loads"]) == (0, 0, 1, 0)
    assert max(cold["error"], warm["error"]) < BOUNDS["16 bits"]


@every_version
def test_what_the_engine_asks_for_beyond_our_path_is_left_to_it(version: str) -> None:
    assert said(version)["taken"]
    assert [name for name, is_refused in said(version)["refused"].items() if not is_refused] == []


@every_version
def test_a_function_that_is_being_traced_stays_the_engines(version: str) -> None:
    assert said(version)["traced"]["ours"] == 0


@every_version
def test_a_kernel_that_fails_leaves_the_layer_to_the_engine_even_in_place(version: str) -> None:
    assert said(version)["failing"] == {
        "ours": 0, "loads": 0, "error": said(version)["stock_error"], "like stock": True,
    }  # fmt: skip


@every_version
def test_a_kernel_that_failed_is_not_tried_again_and_a_line_says_why(version: str) -> None:
    assert said(version)["after a failure"]["ours"] == 0
    assert [line for line in said(version)["lines"] if "no such instruction" in line] == said(version)["lines"]
    assert len(said(version)["lines"]) == 1


@every_version
def test_an_engine_that_is_asked_says_where_our_path_runs_and_what_its_own_kernels_would_take(version: str) -> None:
    environment = engine_environment(version) | {env.STORE: str(store()), env.DISABLE: "", "SGLANG_PLUGINS": ""}
    question = LookupRequest(child.SHAPES["16 bits"], [child.TOKENS // 3, child.TOKENS], specs.known_gpus()[DEVICE])
    served = lookup_probe.AS_SERVED.ask(question, environment)
    alone = lookup_probe.ALONE.ask(question, environment)
    assert served.paths == {child.TOKENS: str(PATHS["16 bits"])}
    assert (served.up, served.down) == (alone.up, alone.down)


def test_all_releases_with_a_sequence_of_kernels_are_hooked() -> None:
    with_sequence = [
        version
        for version in HOOKED_VERSIONS
        if any(
            "_fused_moe_kernel_sequence(" in path.read_text(encoding="utf-8")
            for path in (REPO_ROOT / ".engines" / "sglang" / version).rglob("triton_utils/fused_moe.py")
        )
    ]
    assert with_sequence == WITH_PLUGINS


BATCHES_OF_FEW = [
    "out of place",
    "in place",
    "scaled",
    "one token",
    "experts elsewhere",
    "block",
    "channel",
    "captured",
]


@every_version
@pytest.mark.parametrize("batch", BATCHES_OF_FEW)
def test_few_tokens_run_the_two_launches_without_the_engines_sort_and_right(version: str, batch: str) -> None:
    """Activations stay in 16 bits, so that float8 weights are as near to float32 as those of 16 bits."""
    found = said(version)["few"][batch]
    assert (found["ours"], found["sorts"]) == (1, 0)
    assert found["error"] < BOUNDS["16 bits"]


@every_version
def test_the_launches_for_few_tokens_are_loaded_at_the_first_call_whatever_its_number_of_tokens(version: str) -> None:
    found = said(version)["few"]
    assert (found["more tokens"]["ours"], found["more tokens"]["sorts"]) == (0, 1)
    assert found["more tokens"]["loads"] == len(set(FEW["few 16 bits"].values()) - {None}) + 1  # two where it groups
    assert found["out of place"]["loads"] == 0
    assert found["more tokens"]["error"] < BOUNDS["16 bits"]


@every_version
@pytest.mark.parametrize("batch", ["captured while cold", "traced", "refused", "refused for good"])
def test_a_sort_that_was_put_off_runs_where_the_engines_kernels_run_after_all(version: str, batch: str) -> None:
    found = said(version)["few"][batch]
    assert (found["ours"], found["sorts"]) == (0, 1)
    assert batch == "refused" or found["error"] < BOUNDS["16 bits"]


@every_version
def test_a_launch_for_few_tokens_that_fails_leaves_the_layer_to_the_engine_even_in_place(version: str) -> None:
    found = said(version)["few"]
    for batch in ("failing", "after a failure"):
        assert (found[batch]["ours"], found[batch]["sorts"]) == (0, 1)
        assert found[batch]["error"] < BOUNDS["block"]
    assert [line for line in found["lines"] if "no such launch" in line] == found["lines"]
    assert len(found["lines"]) == 1
