"""Configurations become small enough for a GPU, and lose TMA where it is wrong; nothing else of them changes."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sglang_moe_ext.core import Gpu, MoEShape, Projection, Quantization, Target, TileConfig
from sglang_moe_ext.engines import config_dict, launch_rules
from sglang_moe_ext.engines.launch_rules import KernelLaunch
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.gpu.shared_memory import smem_bytes
from sglang_moe_ext.serving import guard
from sglang_moe_ext.serving.guard import ConfigGuard, SafeEntry, degrade
from tests.tables.generated import powers_of_two

RTX_4090, H200 = find_gpu("RTX 4090"), find_gpu("H200")
GLM = MoEShape(65, 1536, 2048, 5)
SEED = TileConfig(128, 256, 64, 16, num_warps=8, num_stages=4)
OLD, NEW = (0, 5, 17), (0, 5, 18)

QUANTIZATIONS = {
    "bf16": Quantization(),
    "fp8-block": Quantization("fp8_w8a8", (128, 128)),
    "fp8-tensor": Quantization("fp8_w8a8"),
    "fp8-channel": Quantization("fp8_w8a8", per_channel=True),
    "int8-channel": Quantization("int8_w8a8", per_channel=True),
    "int8-weights": Quantization("int8_w8a16", per_channel=True),
    "int4-group": Quantization("int4_w4a16", (0, 128)),
}

usual = st.builds(
    TileConfig,
    block_m=powers_of_two(16, 256),
    block_n=powers_of_two(16, 512),
    block_k=powers_of_two(16, 512),
    group_m=st.integers(1, 64),
    num_warps=powers_of_two(1, 16),
    num_stages=st.integers(1, 8),
    use_tma=st.booleans(),
)
shapes = st.sampled_from([dataclasses.replace(GLM, quantization=it) for it in QUANTIZATIONS.values()])


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    guard.warn_once.cache_clear()


def safe(
    version: tuple[int, int, int], gpu: Gpu | None, entry: dict[str, Any], shape: MoEShape, of: Projection
) -> dict[str, Any]:
    """The entry that leaves the guard."""
    checked = ConfigGuard(version, gpu).check(entry, shape, of)
    assert isinstance(checked, SafeEntry), checked
    return checked.entry


def is_sound(config: TileConfig, shape: MoEShape) -> bool:
    """Whether it keeps the rules that do not concern USE_TMA."""
    launch = KernelLaunch("sglang", NEW, dataclasses.replace(config, use_tma=False), shape, "up")
    return all(rule.keeps(launch) for rule in launch_rules.RULES)


def changed(before: TileConfig, after: TileConfig) -> set[str]:
    names = [item.name for item in dataclasses.fields(TileConfig)]
    return {name for name in names if getattr(before, name) != getattr(after, name)}


@given(usual)
def test_nothing_but_stages_and_the_sides_n_and_k_is_made_smaller(config: TileConfig) -> None:
    for smaller in degrade(config):
        assert changed(config, smaller) <= {"num_stages", "block_n", "block_k"}


@given(usual, shapes, st.sampled_from([80, 89, 90, 100, 120]))
def test_no_step_asks_for_more_than_the_one_before(config: TileConfig, shape: MoEShape, sm: int) -> None:
    asked = [smem_bytes(it, shape, Target(sm)) for it in (config, *degrade(config))]
    assert asked == sorted(asked, reverse=True)


@given(usual, st.sampled_from([32, 64, 128, 256, 512]))
def test_a_tile_that_divides_a_block_of_scales_divides_it_at_each_step(config: TileConfig, block: int) -> None:
    config = dataclasses.replace(config, block_k=min(config.block_k, block))
    assert all(block % it.block_k == 0 for it in degrade(config))


@given(usual)
def test_stages_go_before_n_and_n_before_k(config: TileConfig) -> None:
    steps = [changed(*pair).pop() for pair in itertools.pairwise((config, *degrade(config)))]
    if steps and config.num_stages > 1:
        assert steps.pop() == "num_stages"  # down to one, where nothing else is left
    order = ["num_stages", "block_n", "block_k"]
    assert steps == sorted(steps, key=order.index)


def test_every_step_is_taken() -> None:
    steps = [(it.num_stages, it.block_n, it.block_k) for it in degrade(TileConfig(64, 128, 128, 8, 4, 4))]
    assert steps == [(3, 128, 128), (2, 128, 128), (2, 64, 128), (2, 32, 128), (2, 32, 64), (2, 32, 32), (1, 32, 32)]


def test_the_last_step_is_small_enough_for_any_gpu() -> None:
    last = list(degrade(TileConfig(256, 512, 512, 1, 8, 8)))[-1]
    assert smem_bytes(last, GLM, Target(90)) <= min(it.smem_per_block for it in specs.ARCHITECTURES.values())


@given(usual, shapes, st.sampled_from(["up", "down"]))
def test_an_entry_that_fits_and_is_right_is_a_plain_copy(config: TileConfig, shape: MoEShape, of: Projection) -> None:
    assume(is_sound(config, shape))
    entry = config_dict.config_dict_of(dataclasses.replace(config, use_tma=False)) | {"maxnreg": 168}
    left = safe(NEW, None, entry, shape, of)
    assert left == entry
    assert left is not entry


@given(usual, shapes)
def test_what_leaves_the_guard_fits_wherever_a_smaller_one_does(config: TileConfig, shape: MoEShape) -> None:
    assume(is_sound(config, shape))

    def fits(it: TileConfig) -> bool:
        return smem_bytes(it, shape, RTX_4090.target) <= RTX_4090.smem_per_block

    left = safe(NEW, RTX_4090, config_dict.config_dict_of(config), shape, "up")
    assert fits(config_dict.tile_of(left)) == any(map(fits, (config, *degrade(config))))


@pytest.mark.parametrize(
    ("quantization", "expected"), [("bf16", 10_240), ("int8-weights", 9_216), ("fp8-tensor", 5_120)]
)
def test_a_single_stage_asks_for_what_the_compiler_says(quantization: str, expected: int) -> None:
    """128x32x32 of 0.5.15's kernel for sm_89, by Triton 3.7.1."""
    shape = dataclasses.replace(GLM, quantization=QUANTIZATIONS[quantization])
    assert smem_bytes(TileConfig(128, 32, 32, 1, 4, 1), shape, Target(89)) == expected


def test_the_crash_of_glm_4_7_flash_on_an_rtx_4090_is_a_configuration_that_fits() -> None:
    assert (smem_bytes(SEED, GLM, RTX_4090.target), RTX_4090.smem_per_block) == (147_456, 101_376)
    left = config_dict.tile_of(safe(NEW, RTX_4090, config_dict.config_dict_of(SEED), GLM, "up"))
    assert left == dataclasses.replace(SEED, num_stages=3)
    assert smem_bytes(left, GLM, RTX_4090.target) <= RTX_4090.smem_per_block


def test_the_same_configuration_stays_as_it_is_on_an_h200() -> None:
    assert safe(NEW, H200, config_dict.config_dict_of(SEED), GLM, "up") == config_dict.config_dict_of(SEED)


def test_what_else_an_entry_says_stays_when_it_is_made_smaller() -> None:
    entry = config_dict.config_dict_of(SEED) | {"maxnreg": 168, "SPLIT_K": 1}
    left = safe(NEW, RTX_4090, entry, GLM, "up")
    assert left == entry | {"num_stages": 3}


def test_an_entry_without_stages_is_held_against_what_triton_takes() -> None:
    entry = {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 256, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 8}
    assert safe(NEW, RTX_4090, entry, GLM, "up")["num_stages"] < 3


def test_what_was_made_smaller_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        safe(NEW, RTX_4090, config_dict.config_dict_of(SEED), GLM, "up")
    (line,) = caplog.messages
    assert "147456 B" in line
    assert "101376 B" in line


DOWN_IS_RIGHT = {"bf16", "fp8-block", "int8-weights"}
UP_IS_WRONG = {"int4-group"}


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_tma_of_the_down_projection_stays_where_it_is_right_alone(name: str) -> None:
    entry: dict[str, Any] = config_dict.config_dict_of(dataclasses.replace(SEED, use_tma=True))
    shape = dataclasses.replace(GLM, quantization=QUANTIZATIONS[name])
    assert config_dict.USE_TMA in entry
    assert safe(NEW, H200, entry, shape, "down").get(config_dict.USE_TMA, False) == (name in DOWN_IS_RIGHT)


@pytest.mark.parametrize("version", [OLD, NEW], ids=["0.5.17", "0.5.18"])
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_tma_of_the_up_projection_stays_from_0_5_18_on(name: str, version: tuple[int, int, int]) -> None:
    entry = config_dict.config_dict_of(dataclasses.replace(SEED, use_tma=True))
    shape = dataclasses.replace(GLM, quantization=QUANTIZATIONS[name])
    stays = version == NEW and name not in UP_IS_WRONG
    assert safe(version, H200, entry, shape, "up").get(config_dict.USE_TMA, False) == stays


def test_tma_that_is_off_leaves_no_key_behind() -> None:
    entry = config_dict.config_dict_of(SEED) | {config_dict.USE_TMA: False}
    assert config_dict.USE_TMA not in safe(OLD, H200, entry, GLM, "up")


def test_wrong_tma_is_said_once_for_each_layer_and_projection(caplog: pytest.LogCaptureFixture) -> None:
    shape = dataclasses.replace(GLM, quantization=QUANTIZATIONS["fp8-channel"])
    for group_m, projection in itertools.product((1, 16), ("up", "down", "down")):
        entry = config_dict.config_dict_of(dataclasses.replace(SEED, use_tma=True, group_m=group_m))
        safe(OLD, H200, entry, shape, projection)  # type: ignore[arg-type]
    assert len(caplog.messages) == 2


MI300X, MI355X = find_gpu("MI300X"), find_gpu("MI355X")
ON_AMD = {"waves_per_eu": 2, "matrix_instr_nonkdim": 16, "kpack": 2}


def test_options_for_amd_gpus_stay_there_and_go_where_triton_would_refuse_them() -> None:
    plain = config_dict.config_dict_of(TileConfig(64, 64, 64, 1, 4, 2))
    assert safe(NEW, MI300X, plain | ON_AMD, GLM, "up") == plain | ON_AMD
    assert safe(NEW, H200, plain | ON_AMD, GLM, "up") == plain


def test_an_entry_is_fitted_to_the_lds_of_an_amd_gpu() -> None:
    entry = config_dict.config_dict_of(TileConfig(128, 256, 128, 1, 8, 2)) | ON_AMD
    assert safe(NEW, MI355X, entry, GLM, "up") == entry
    assert safe(NEW, MI300X, entry, GLM, "up") == entry | {"BLOCK_SIZE_N": 128}


def test_an_entry_without_stages_is_held_against_what_triton_takes_on_amd_gpus() -> None:
    """One stage less than on NVIDIA GPUs."""
    entry = {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 8, "num_warps": 8}
    assert safe(NEW, MI300X, entry, GLM, "up") == entry | {"num_stages": 2}
