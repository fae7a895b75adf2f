"""Our hooks in the real modules of each engine: who calls us, what we answer, and when we keep out."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import triton

from sglang_moe_ext import env
from sglang_moe_ext.core import MoEShape, Table, TileConfig
from sglang_moe_ext.engines.config_dict import config_dict_of
from sglang_moe_ext.engines.sglang import hook_points, table_names
from sglang_moe_ext.engines.sglang.installation import parse_version
from sglang_moe_ext.tables import config_table, files, provenance
from sglang_moe_ext.tables.provenance import Provenance, ProvenanceEntry
from tests.engines.children import hooked_engine as child
from tests.engines.installed import HOOKED_VERSIONS, REPO_ROOT, run_in_engine
from tests.tables.generated import A_RUN

CHILD = Path(child.__file__)
DEVICE = "NVIDIA H200"
UP: Table = {64: TileConfig(16, 64, 64, 1, 4, 3, use_tma=True), 4096: TileConfig(64, 64, 64, 8, 4, 3)}
DOWN: Table = {64: TileConfig(16, 32, 64, 4, 8, 2, use_tma=True), 4096: TileConfig(64, 32, 64, 8, 4, 3)}
UP_TMA = (0, 5, 18)
WITH_PLUGINS = [version for version in HOOKED_VERSIONS if parse_version(version) >= (0, 5, 12)]
SCHEMES = [name for name in child.SHAPES if name != "no table"]


def as_0_5_5_asks(shape: MoEShape) -> MoEShape:
    """Its lookup is not told whether scales are per channel."""
    return dataclasses.replace(shape, quantization=dataclasses.replace(shape.quantization, per_channel=False))


@functools.cache
def store() -> Path:
    """A user's store with tables for all layers that the child asks for."""
    root = Path(tempfile.mkdtemp(prefix="hooks_"))
    folder = root / "tables" / "sglang" / table_names.version_folder(triton.__version__)
    for shape in (asked for name in SCHEMES for asked in (child.SHAPES[name], as_0_5_5_asks(child.SHAPES[name]))):
        made = ProvenanceEntry("measured", dataclasses.replace(A_RUN, shape=str(child.SHAPES["bf16"])))
        for down, table in ((False, UP), (True, DOWN)):
            path = folder / table_names.file_name(table_names.table_key(shape, DEVICE, down=down))
            said = provenance.to_json(Provenance(dict.fromkeys(table, made)))
            files.write_together({path: config_table.to_json(table), provenance.sidecar(path): said})
    return root


@functools.cache
def site() -> Path:
    """A folder with the metadata of our wheel, so that entry points are found there."""
    folder = Path(tempfile.mkdtemp(prefix="site_"))
    metadata = folder / "sglang_moe_ext-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang-moe-ext\nVersion: 0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nsglang_moe_ext = sglang_moe_ext.serving.plugin:register_sglang\n", encoding="utf-8"
    )
    return folder


@functools.cache
def said(version: str) -> dict[str, Any]:
    request = {"packaging": str(REPO_ROOT / "packaging"), "site": str(site()), "device": DEVICE}
    environment = {env.STORE: str(store()), env.DISABLE: "", "SGLANG_PLUGINS": ""}
    answer: dict[str, Any] = run_in_engine(version, CHILD, request, env=environment)
    return answer


every_version = pytest.mark.parametrize("version", HOOKED_VERSIONS)


def has_up_tma(version: str) -> bool:
    return parse_version(version) >= UP_TMA


def up_entry(version: str) -> dict[str, Any]:
    return config_dict_of(dataclasses.replace(UP[64], use_tma=has_up_tma(version)))


@every_version
@pytest.mark.parametrize("name", child.NAMES)
def test_every_module_that_holds_a_function_of_the_engine_holds_ours(version: str, name: str) -> None:
    assert [module for module in said(version)["holders"][name] if not module.endswith("*")] == []


@every_version
def test_the_modules_that_call_the_lookup_are_among_its_holders(version: str) -> None:
    package = "sglang.srt.layers.moe." + (
        "fused_moe_triton" if parse_version(version) < (0, 5, 11) else "moe_runner.triton_utils"
    )
    expected = {f"{package}*", f"{package}.fused_moe*", f"{package}.fused_moe_triton_config*"}
    assert expected <= set(said(version)["holders"][hook_points.LOOKUP])


@every_version
def test_the_kernel_module_and_the_layer_hold_our_launcher(version: str) -> None:
    assert len(said(version)["holders"][hook_points.LAUNCH]) >= 2


@every_version
def test_a_call_for_both_projections_returns_a_pair_of_ours(version: str) -> None:
    assert said(version)["pair"] == [up_entry(version), [config_dict_of(DOWN[64]), 64]]


@every_version
def test_a_call_for_one_entry_returns_ours_without_tma(version: str) -> None:
    assert said(version)["up_only"] == config_dict_of(dataclasses.replace(UP[64], use_tma=False))


@every_version
def test_an_answer_that_is_changed_does_not_change_the_next(version: str) -> None:
    assert said(version)["is_fresh"]


@every_version
def test_the_engines_override_comes_first(version: str) -> None:
    assert said(version)["override"][0]


@every_version
def test_after_the_engines_override_ours_is_back(version: str) -> None:
    assert said(version)["override"][1] == said(version)["pair"]


@every_version
def test_deterministic_inference_comes_first(version: str) -> None:
    assert said(version)["deterministic"]


@every_version
def test_without_a_table_the_engines_own_choice_is_returned(version: str) -> None:
    assert said(version)["no_table"]


@every_version
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tma_of_the_up_projection_reaches_releases_that_know_it(version: str, scheme: str) -> None:
    assert said(version)["tma"][scheme][0] == (has_up_tma(version) and scheme != "int4")


@every_version
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tma_of_the_down_projection_is_on_where_the_engine_is_right(version: str, scheme: str) -> None:
    assert said(version)["tma"][scheme][1] == (scheme in ("bf16", "fp8-block"))


@every_version
@pytest.mark.parametrize("scheme", ["fp8-channel", "int8-channel", "int4"])
def test_tma_that_would_compute_wrong_results_is_said_to_be_off_once(version: str, scheme: str) -> None:
    assert len([line for line in said(version)["tma"][scheme][2] if "of the down projection" in line]) == 1


@every_version
def test_the_first_call_says_in_one_line_what_is_active(version: str) -> None:
    (line,) = [line for line in said(version)["first_lines"] if "is active" in line]
    assert line.endswith(f"is active in SGLang {version}, by the startup file")


@every_version
def test_one_line_says_which_table_a_layer_runs(version: str) -> None:
    lines = [line for line in said(version)["first_lines"] if str(child.SHAPES["bf16"]) in line and "table" in line]
    assert len(lines) == 1
    assert str(store()) in lines[0]


@every_version
def test_attaching_again_changes_nothing(version: str) -> None:
    assert said(version)["wrapped_once"] == [True, True]


@every_version
@pytest.mark.parametrize(
    ("way", "called"),
    [("startup", "the startup file"), ("entry point", "the entry point"), ("patch", "a patch")],
    ids=["startup", "entry-point", "patch"],
)
def test_each_way_in_hooks_the_engine_and_says_nothing_yet(version: str, way: str, called: str) -> None:
    assert said(version)["ways"][way] == [True, called, []]


@pytest.mark.parametrize("version", WITH_PLUGINS)
def test_the_engines_own_loader_of_plugins_hooks_it(version: str) -> None:
    assert said(version)["ways"]["load_plugins"] == [True, "the entry point", []]


@every_version
@pytest.mark.parametrize("variable", [env.DISABLE, "SGLANG_PLUGINS"])
def test_a_variable_keeps_us_out(version: str, variable: str) -> None:
    assert said(version)["kept_out"][variable]


@every_version
def test_a_list_of_plugins_that_names_us_lets_us_in(version: str) -> None:
    assert said(version)["let_in"]


MOVED = {
    "the lookup is gone": "has no function try_get_optimal_moe_config",
    "the launcher is gone": "has no function invoke_fused_moe_kernel",
    "the lookup takes other arguments": "try_get_optimal_moe_config takes other arguments: shape",
    "the launcher takes other arguments": "invoke_fused_moe_kernel takes its config elsewhere: a, b",
    "the default takes other arguments": "get_default_config takes other arguments: m",
    "the layer uses another launcher": "does not use invoke_fused_moe_kernel",
}


@every_version
@pytest.mark.parametrize("what", MOVED)
def test_a_target_that_moved_leaves_all_of_the_engine_as_it_is(version: str, what: str) -> None:
    is_untouched, is_active, _ = said(version)["moved"][what]
    assert (is_untouched, is_active) == (True, False)


@every_version
@pytest.mark.parametrize("what", MOVED)
def test_a_target_that_moved_is_said_once_however_many_ways_lead_in(version: str, what: str) -> None:
    (line,) = said(version)["moved"][what][2]
    assert "is off, the engine runs as it is" in line
    assert MOVED[what] in line


ASKED = [55296, 36864, 18432, 10240, 6144]
"""Bytes of 16x128x64 in bf16 with four, three and two stages, then with 64 and 32 columns."""


@functools.cache
def launched(version: str) -> dict[str, Any]:
    """No GPU refuses a launch here: a stand-in for the engine's kernel does, with the error that Triton raises."""
    request = {"packaging": str(REPO_ROOT / "packaging"), "tile": [16, 128, 64, 1, 4, 4, False], "limit": 8192}
    answer: dict[str, Any] = run_in_engine(version, CHILD, request, env={"TRITON_INTERPRET": "1", env.DISABLE: ""})
    return answer


interpreted_versions = pytest.mark.parametrize("version", ["0.5.5", "0.5.23"])


@interpreted_versions
def test_what_is_refused_is_launched_smaller_and_computes_what_it_should(version: str) -> None:
    assert launched(version)["errors"] == pytest.approx([0.0, 0.0], abs=3e-3)


@interpreted_versions
def test_the_first_launch_goes_down_step_by_step(version: str) -> None:
    assert launched(version)["asked"][0] == ASKED


@interpreted_versions
def test_the_second_launch_asks_for_what_fitted_alone(version: str) -> None:
    assert launched(version)["asked"][1] == ASKED[-1:]


@interpreted_versions
def test_a_refusal_is_said_once(version: str) -> None:
    (line,) = [line for line in launched(version)["lines"] if "does not fit this GPU" in line]
    assert "16x128x64 G1 w4 s4" in line
    assert "runs 16x32x64 G1 w4 s2 instead" in line
