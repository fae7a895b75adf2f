"""Our plugin in the real vLLM, installed as a user installs it: what is found, what runs, and when we keep out.

One process a version answers all of it; its GPU is one that the engine is told to believe in.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import triton

from sglang_moe_ext import env
from sglang_moe_ext.core import MoEShape, Origin, Quantization, Table, TileConfig
from sglang_moe_ext.engines.config_dict import config_dict_of, launch_args
from sglang_moe_ext.engines.sglang import table_names as sglangs
from sglang_moe_ext.engines.table_names import TableNaming
from sglang_moe_ext.engines.vllm import table_names
from sglang_moe_ext.tables import config_table, files, provenance
from sglang_moe_ext.tables.provenance import Provenance, ProvenanceEntry
from tests.engines.children import hooked_vllm as child
from tests.engines.installed import REPO_ROOT, VLLM_VERSIONS, run_in_vllm, vllm_environment
from tests.tables.generated import A_RUN

CHILD = Path(child.__file__)
DEVICE = "NVIDIA H200"
TABLE: Table = {64: TileConfig(16, 64, 64, 1, 4, 3), 4096: TileConfig(64, 64, 64, 8, 4, 3)}
ANOTHER: Table = {64: TileConfig(32, 32, 64, 1, 4, 2)}
WITH_TMA: Table = {m: dataclasses.replace(config, use_tma=True) for m, config in TABLE.items()}
OVERRIDE = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 16, "BLOCK_SIZE_K": 16, "GROUP_SIZE_M": 3}
NAMED_FOLDER = "VLLM_TUNED_CONFIG_FOLDER"
UNSERVED = ("of-sglang", "predicted-in-sglang", "damaged", "damaged-by-the-user", "of-another-layer", "no-table")
HALF = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 8, "SPLIT_K": 1}
"""What the engine runs where it promises the same result whatever the batch."""


DEVICES = (DEVICE, "NVIDIA H200 NVL", "NVIDIA RTX PRO 6000 Blackwell Server Edition", "NVIDIA H20-3e")
QUANTIZATIONS = (
    Quantization(),
    Quantization("fp8_w8a8"),
    Quantization("fp8_w8a8", per_channel=True),
    Quantization("fp8_w8a8", (128, 128)),
    Quantization("fp8_w8a8", (64, 64)),
    Quantization("int8_w8a8", per_channel=True),
    Quantization("int8_w8a16", (0, 128)),
    Quantization("int4_w4a16", (0, 32)),
)
NAMES = list(itertools.product(DEVICES, QUANTIZATIONS))


def name_asked(device: str, quantization: Quantization) -> list[Any]:
    """As the engine asks for a table of 64 experts with 1536 columns: its dtype for int8_w8a8 is none."""
    scheme = None if quantization.scheme == "int8_w8a8" else quantization.scheme
    return [device, 64, 1536, scheme, quantization.block_shape and list(quantization.block_shape)]


def shape_of(name: str) -> MoEShape:
    experts, columns, scheme, block = child.LAYERS[name]
    quantization = Quantization(scheme, None if block is None else (block[0], block[1]))  # type: ignore[arg-type]
    packed = 2 if scheme == "int4_w4a16" else 1
    return MoEShape(experts, columns * packed, child.HIDDEN, child.TOP_K, quantization)


def put(
    folder: Path,
    name: str,
    table: Table,
    *,
    origin: Origin | None = "measured",
    dialect: TableNaming = table_names.NAMING,
    made_for: MoEShape | None = None,
) -> Path:
    shape = shape_of(name)
    path = folder / dialect.file_name(dialect.key(shape, DEVICE))
    made = None if origin is None else ProvenanceEntry(origin, dataclasses.replace(A_RUN, shape=str(made_for or shape)))
    said = (
        {} if made is None else {provenance.sidecar(path): provenance.to_json(Provenance(dict.fromkeys(table, made)))}
    )
    files.write_together({path: config_table.to_json(table), **said})
    return path


def of_triton(root: Path, engine: str) -> Path:
    return root / "tables" / engine / sglangs.version_folder(triton.__version__)


def furnish(root: Path) -> None:
    """A user's store, the folder that the user names to the engine, and a table that comes later."""
    ours, of_sglang, named = of_triton(root / "store", "vllm"), of_triton(root / "store", "sglang"), root / "named"
    for name in ("bf16", "fp8-block", "int4", "named-by-the-user"):
        put(ours, name, TABLE)
    put(ours, "of-another-layer", TABLE, made_for=dataclasses.replace(shape_of("bf16"), hidden_size=64))
    for name, origin in (("of-sglang", "measured"), ("predicted-in-sglang", "predicted"), ("bf16", "measured")):
        put(of_sglang, name, WITH_TMA, origin=origin, dialect=sglangs.NAMING)  # type: ignore[arg-type]
    put(named, "named-by-the-user", ANOTHER, origin=None)
    put(named, "with-tma", WITH_TMA, origin=None)
    for place, name in ((ours, "damaged"), (named, "damaged-by-the-user")):
        path = put(place, name, TABLE)
        path.write_bytes(path.read_bytes()[:-40])
    put(of_triton(root / "late", "vllm"), "no-table", TABLE)


@functools.cache
def installed() -> Path:
    """A folder with our wheel, as pip installs it."""
    built, folder = Path(tempfile.mkdtemp(prefix="wheel_")), Path(tempfile.mkdtemp(prefix="installed_"))
    pip = [sys.executable, "-m", "pip"]
    wheel = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(built), "."]
    subprocess.run(wheel, cwd=REPO_ROOT, check=True, capture_output=True)
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), *built.glob("*.whl")]
    subprocess.run(install, check=True, capture_output=True)
    return folder


@functools.cache
def told(version: str) -> tuple[Path, dict[str, Any]]:
    """The folder that was furnished, and what the process said."""
    root = Path(tempfile.mkdtemp(prefix="vllm_hooks_"))
    furnish(root)
    environment = vllm_environment(version, installed())
    environment |= {env.STORE: str(root / "store"), NAMED_FOLDER: str(root / "named")}
    request = {"device": DEVICE, "store": str(root / "store"), "late": str(root / "late"), "override": OVERRIDE}
    request |= {"names": [name_asked(*case) for case in NAMES]}
    answer: dict[str, Any] = run_in_vllm(CHILD, request, environment)
    return root, answer


def said(version: str) -> dict[str, Any]:
    return told(version)[1]


every_version = pytest.mark.parametrize("version", VLLM_VERSIONS)


def ours(config: TileConfig) -> dict[str, Any]:
    """As an entry of ours reaches vLLM's kernel, which has a SPLIT_K and no USE_TMA."""
    return launch_args(config) | {"SPLIT_K": 1}


def from_json(table: Any) -> Any:
    return None if table is None else {int(m): entry for m, entry in table.items()}


@every_version
def test_the_engines_own_loader_of_plugins_brings_us_in(version: str) -> None:
    assert said(version)["state"] == [True, "the entry point"]


@every_version
def test_it_is_the_installed_wheel_that_runs(version: str) -> None:
    assert Path(said(version)["ours_lies_in"]).is_relative_to(installed())


@every_version
def test_the_entry_point_imports_no_layer_of_the_engine_and_nothing_heavy_of_ours(version: str) -> None:
    loaded = {"core", "schemes", "env", "import_hook", "serving", "serving.plugin"}
    loaded |= {"engines", "engines.installed_engines", "engines.vllm", "engines.vllm.installation"}
    assert set(said(version)["early"]) == {f"sglang_moe_ext.{name}" for name in loaded}


@every_version
def test_our_file_names_are_the_engines(version: str) -> None:
    shapes = [(MoEShape(64, 1536, 2048, 4, quantization), device) for device, quantization in NAMES]
    assert [table_names.file_name(table_names.table_key(*it)) for it in shapes] == said(version)["names"]


@every_version
def test_nothing_is_said_before_a_layer_runs(version: str) -> None:
    assert said(version)["lines_before"] == []


@every_version
@pytest.mark.parametrize("name", ["bf16", "fp8-block", "int4"])
def test_a_layer_runs_the_entry_of_the_users_own_table(version: str, name: str) -> None:
    assert said(version)["answers"][name] == ours(TABLE[64])


@every_version
def test_a_table_that_the_engine_ships_stays_where_ours_is_of_another_engine(version: str) -> None:
    folder = vllm_environment(version)["PYTHONPATH"].rpartition(":")[2]
    (path,) = Path(folder).rglob("fused_moe/configs/E=128,N=768,device_name=NVIDIA_H200.json")
    table = from_json({m: entry for m, entry in json.loads(path.read_text()).items() if m != "triton_version"})
    assert said(version)["stock"] == [table[min(table, key=lambda m: abs(m - tokens))] for tokens in (1, 64, 5000)]


@every_version
def test_the_folder_that_the_user_names_to_the_engine_comes_first(version: str) -> None:
    expected = config_dict_of(ANOTHER[64])
    assert said(version)["answers"]["named-by-the-user"] == expected
    assert said(version)["few_tokens_of_the_users"] == expected


@every_version
@pytest.mark.parametrize(("answer", "tokens"), [("few_tokens", "1"), ("far_tokens", "9")])
def test_numbers_of_tokens_beyond_a_tables_range_run_the_engines_default(
    version: str, answer: str, tokens: str
) -> None:
    assert said(version)[answer] == said(version)["defaults"][tokens]


@every_version
@pytest.mark.parametrize("name", UNSERVED)
def test_what_is_no_table_for_the_layer_leaves_it_to_the_engines_default(version: str, name: str) -> None:
    assert said(version)["answers"][name] == said(version)["defaults"]["64"]


@every_version
def test_a_damaged_table_is_passed_over_with_one_line(version: str) -> None:
    (line,) = [line for line in said(version)["lines"] if "passes over a table" in line and "E=15," in line]
    assert "is not valid JSON" in line


@every_version
def test_a_users_table_that_would_end_the_engine_is_named_in_one_line(version: str) -> None:
    lines = [line for line in said(version)["lines"] if "its own lookup failed: JSONDecodeError" in line]
    assert len(lines) == 1


@every_version
def test_a_users_entry_with_tma_loses_what_the_kernel_does_not_know(version: str) -> None:
    assert said(version)["answers"]["with-tma"] == config_dict_of(TABLE[64])


@every_version
def test_who_asks_for_a_whole_table_gets_it(version: str) -> None:
    assert from_json(said(version)["named"]["int4"]) == {m: ours(config) for m, config in TABLE.items()}


@every_version
def test_who_asks_for_a_whole_table_gets_the_users_named_one_first(version: str) -> None:
    assert from_json(said(version)["named"]["named-by-the-user"]) == {64: config_dict_of(ANOTHER[64])}


@every_version
def test_who_asks_for_a_table_that_nobody_has_gets_none(version: str) -> None:
    assert said(version)["named"]["no-table"] is None


@every_version
def test_the_engines_override_comes_first_and_leaves_nothing_behind(version: str) -> None:
    assert said(version)["overridden"] == OVERRIDE
    assert said(version)["after_override"] == ours(TABLE[64])


@every_version
def test_batch_invariance_comes_first(version: str) -> None:
    entry, table, default = said(version)["invariant"]
    assert (entry, table) == (HALF, None)
    assert default == HALF


@every_version
def test_an_answer_that_is_changed_does_not_change_the_next(version: str) -> None:
    assert said(version)["is_fresh"]


@every_version
def test_the_cache_of_the_engine_can_still_be_looked_at(version: str) -> None:
    assert said(version)["cache_info"] == ["hits", "misses", "maxsize", "currsize"]


@every_version
def test_a_table_that_comes_later_is_met_once_the_cache_is_cleared(version: str) -> None:
    before, after, kept = said(version)["late"]
    assert (before, after, kept) == (said(version)["defaults"]["64"], ours(TABLE[64]), 0)


@every_version
def test_no_variable_of_the_process_is_changed(version: str) -> None:
    assert said(version)["moves_no_variable"]


@every_version
def test_whatever_fails_in_ours_the_engine_runs_its_own(version: str) -> None:
    (bf16, fp8_block, table), lines, _ = said(version)["broken"]
    assert (bf16, table) == (said(version)["defaults"]["64"], None)
    assert fp8_block["BLOCK_SIZE_K"] == 128  # the engine's default for blocks of 128; ours has 64
    (line,) = lines
    assert line.endswith("the engine's own tables are taken, ours failed: RuntimeError: broken")


@every_version
def test_a_call_with_shapes_that_are_none_gets_what_the_engine_makes_of_it(version: str) -> None:
    of_lists, of_one_size = said(version)["broken"][2]
    assert of_lists in (said(version)["defaults"]["64"], ours(TABLE[64]))
    assert "not enough values to unpack" in of_one_size


@every_version
def test_loading_the_plugin_again_changes_nothing(version: str) -> None:
    assert said(version)["twice"]


@every_version
@pytest.mark.parametrize("name", child.NAMES)
def test_every_module_that_holds_a_function_of_the_engine_holds_ours(version: str, name: str) -> None:
    held = said(version)["holders"][name]
    assert child.LAYER in held
    assert [module for module, is_ours in held.items() if not is_ours] == []


@every_version
def test_the_experts_and_lora_call_our_lookup(version: str) -> None:
    held = set(said(version)["holders"][child.NAMES[0]])
    assert "vllm.lora.layers.utils" in held
    assert any("fused_batched_moe" in module for module in held)


@every_version
def test_one_line_says_who_is_active_with_which_tables_and_that_they_matter(version: str) -> None:
    root, answer = told(version)
    (line,) = [line for line in answer["lines"] if "is active" in line]
    assert f"is active in vLLM {version}, by the entry point, with the tables in {root / 'named'}, " in line
    assert line.endswith(": a layer asks for a table")


@every_version
def test_each_kind_of_experts_says_once_whether_it_reads_tables(version: str) -> None:
    triton_experts, other, fallback = said(version)["built"]
    assert triton_experts.endswith(": TritonExperts uses Triton config tables")
    assert other.endswith(": FusedMoEExpertsModular does not use Triton config tables; tuning has no effect")
    assert fallback.endswith(": FallbackExperts uses Triton config tables")


@every_version
def test_the_experts_that_read_tables_are_those_of_the_triton_kernels(version: str) -> None:
    reading = {name for name, reads in said(version)["reads"].items() if reads}
    assert {"TritonExperts", "TritonWNA16Experts", "BatchedTritonExperts"} <= reading
    assert [name for name in reading if not any(word in name for word in ("Triton", "Emulation", "Mxfp8"))] == []


@every_version
def test_other_experts_are_known_to_read_none(version: str) -> None:
    silent = {name for name, reads in said(version)["reads"].items() if not reads}
    assert {"NaiveBatchedExperts", "CutlassExpertsFp8", "DeepGemmExperts"} <= silent


LAUNCHES = {
    "bf16": [[128, 128, 128, 2]],  # 131072 B with three stages
    "int8": [[128, 128, 128, 3]],
    "fp8-block": [[128, 128, 128, 4]],  # 98304 B once the launcher has cut the tile to a block of scales
    "refused": [[128, 128, 64, 3], [128, 128, 64, 2]],
    "again": [[128, 128, 64, 2]],
    "override": [[128, 128, 64, 5]],
}
"""Tiles and stages that reach the kernel on an RTX 4090, which has 101376 B a block."""


@every_version
@pytest.mark.parametrize("launch", LAUNCHES)
def test_what_a_small_gpu_cannot_hold_reaches_the_kernel_smaller_and_the_rest_as_it_is(
    version: str, launch: str
) -> None:
    assert said(version)["launches"][launch] == LAUNCHES[launch]


@every_version
def test_what_runs_smaller_is_said_once(version: str) -> None:
    before, refused = said(version)["launches"]["lines"]
    assert "asks for 131072 B of shared memory" in before
    assert "128x128x64 G1 w8 s3 does not fit this GPU" in refused


@every_version
@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("late", [True, "the entry point", False]),
        ("named", [True, "the entry point", False]),
        ("switched off", [False, f"{env.DISABLE} is set", True]),
        ("the startup file", [False, f"{env.VLLM_PLUGINS}=another does not name sglang_moe_ext", True]),
    ],
)
def test_each_way_in_and_each_switch_does_what_it_says(version: str, way: str, expected: list[Any]) -> None:
    assert said(version)["ways"][way] == expected


@every_version
def test_a_list_of_plugins_without_us_keeps_us_out(version: str) -> None:
    is_active, _, is_untouched = said(version)["ways"]["other plugins"]
    assert (is_active, is_untouched) == (False, True)


MOVED = {
    "the lookup is gone": "has no function try_get_optimal_moe_config",
    "the lookup takes other arguments": "try_get_optimal_moe_config takes other arguments: shape",
    "the table takes other arguments": "get_moe_configs takes other arguments: E",
    "the table has no cache": "get_moe_configs has no cache_clear",
    "the launcher takes other arguments": "invoke_fused_moe_triton_kernel takes its config elsewhere: a, b",
    "the launcher for groups is gone": "has no function invoke_fused_moe_wna16_triton_kernel",
    "nothing says what is built": "has no class FusedMoEKernel",
}


@every_version
@pytest.mark.parametrize("what", MOVED)
def test_a_target_that_moved_leaves_all_of_the_engine_as_it_is(version: str, what: str) -> None:
    is_untouched, is_active, _ = said(version)["moved"][what]
    assert (is_untouched, is_active) == (True, False)


@every_version
def test_a_plan_behind_our_sort_runs_where_the_layer_is_long_or_comes_from_a_graph(version: str) -> None:
    """Loaded at the first call, by batches of 16 and 3 tokens."""
    found = said(version)["few"]["sorted"]
    layer = "E=12,N=128,K=128,topk=2,dtype=bfloat16"
    loads, ran = [f"{layer} True 16", f"{layer} True 3"], f"{layer} True 4"
    assert found["long"] == [*loads, ran]
    assert found["long again"] == [ran]
    assert found["short"] == [*loads, "engine's"]
    assert found["short in a graph"] == [ran]


@every_version
def test_a_plan_that_needs_the_engines_up_gemm_is_for_another_engine(version: str) -> None:
    assert said(version)["few"]["sorted"]["mixed"] == ["engine's"]


@every_version
@pytest.mark.parametrize("what", MOVED)
def test_a_target_that_moved_is_said_once_however_often_we_are_called(version: str, what: str) -> None:
    (line,) = said(version)["moved"][what][2]
    assert "is off, the engine runs as it is" in line
    assert MOVED[what] in line


@every_version
def test_few_tokens_run_the_two_launches_in_the_place_of_the_triton_experts_method(version: str) -> None:
    """Loaded by one token at the first call, whatever its number of tokens."""
    few = said(version)["few"]
    assert few["is_hooked"]
    assert few["few"] == [["ours", 1, True], ["ours", 4, True]]
    assert few["again"] == [["ours", 4, True]]
    assert few["one"] == [["ours", 1, True]]


@every_version
def test_more_tokens_than_the_two_launches_won_at_run_the_engines_method(version: str) -> None:
    assert said(version)["few"]["more"] == ["engine's"]


@every_version
def test_what_the_engine_asks_of_its_experts_beyond_the_two_launches_is_left_to_it(version: str) -> None:
    assert {name: ran for name, ran in said(version)["few"]["refused"].items() if ran != ["engine's"]} == {}


@every_version
def test_two_launches_that_fail_leave_the_layer_to_the_engine_and_are_not_tried_again(version: str) -> None:
    few = said(version)["few"]
    assert (few["failing"], few["after a failure"]) == (["engine's"], ["engine's"])
    assert len([line for line in few["lines"] if "no such launch" in line]) == 1
