"""SGLang's own kernel, compiled for GPUs that are not here, needs what it was found to need."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import CompileJob, CompileKey, MoEShape, Projection, Quantization, Target
from sglang_moe_ext.engines.sglang.runner import _class, representative_tokens
from sglang_moe_ext.gpu.specs import ARCHITECTURES
from tests.engines.installed import run_in_engine

pytestmark = pytest.mark.usefixtures("forked_engines")

CHILD = Path(__file__).parents[1] / "children" / "compile_jobs.py"
VERSIONS = ("0.5.8", "0.5.15", "0.5.23")


def layer(scheme: Any = None, block_shape: tuple[int, int] | None = None, per_channel: bool = False) -> MoEShape:
    return MoEShape(128, 768, 2048, 8, Quantization(scheme, block_shape, per_channel))


BF16, FP8_BLOCK = layer(), layer("fp8_w8a8", (128, 128))
PLAIN, TMA = CompileKey(64, 128, 64, 4, 3), CompileKey(64, 128, 64, 4, 3, use_tma=True)
OVERSIZED = CompileKey(128, 256, 64, 8, 4)


def job(shape: MoEShape, projection: Projection = "up", key: CompileKey = PLAIN, sm: int = 90) -> CompileJob:
    return CompileJob(shape, projection, 1024, key, Target(sm))


# Bytes of shared memory with Triton 3.7.1 on 2026-11-21, the same in all three versions; TMA takes 8 B a stage.
SMEM_BYTES = {
    "bf16 up": (job(BF16), 73728),
    "bf16 down": (job(BF16, "down"), 73728),
    "bf16 wide": (job(BF16, key=CompileKey(128, 256, 64, 8, 4)), 196608),
    "fp8 per tensor": (job(layer("fp8_w8a8")), 36864),
    "fp8 per channel": (job(layer("fp8_w8a8", per_channel=True)), 36864),
    "fp8 block": (job(FP8_BLOCK, key=CompileKey(64, 128, 128, 4, 3)), 73728),
    "int8 per channel": (job(layer("int8_w8a8", per_channel=True)), 36864),
    "bf16 down by TMA": (job(BF16, "down", TMA), 73752),
    "fp8 block down by TMA": (job(FP8_BLOCK, "down", CompileKey(64, 128, 128, 4, 3, use_tma=True)), 73752),
    "bf16 on sm_80": (job(BF16, sm=80), 49152),
    "bf16 on sm_89": (job(BF16, sm=89), 49152),
    "bf16 on sm_100": (job(BF16, sm=100), 73744),
}
OTHERS = {"oversized": job(BF16, key=OVERSIZED, sm=89), "fp8 on sm_80": job(FP8_BLOCK, sm=80)}
JOBS = {name: asked for name, (asked, _) in SMEM_BYTES.items()} | OTHERS


@functools.cache
def needs(version: str) -> dict[str, dict[str, Any]]:
    """What each of JOBS needs in that version, all from one process."""
    answers = run_in_engine(version, CHILD, [asdict(asked) for asked in JOBS.values()])
    return dict(zip(JOBS, answers, strict=True))


every_version = pytest.mark.parametrize("version", VERSIONS)


@every_version
@pytest.mark.parametrize("name", SMEM_BYTES)
def test_the_engines_kernel_asks_for_this_much_shared_memory(version: str, name: str) -> None:
    assert needs(version)[name].get("smem") == SMEM_BYTES[name][1], needs(version)[name]


@every_version
@pytest.mark.parametrize("name", SMEM_BYTES)
def test_a_kernel_whose_accumulator_has_room_spills_nothing(version: str, name: str) -> None:
    assert needs(version)[name].get("spill") == 0, needs(version)[name]


@every_version
def test_a_config_too_large_for_the_gpu_is_seen_to_be(version: str) -> None:
    found = needs(version)["oversized"]
    assert "failure" in found or found["smem"] > ARCHITECTURES[89].smem_per_block


@every_version
def test_fp8_is_refused_for_a_gpu_that_has_none_and_the_reason_is_kept(version: str) -> None:
    found = needs(version)["fp8 on sm_80"]
    assert found.get("failure") == "CompilationError" and "not supported in this architecture" in found["message"]


shapes = st.builds(
    MoEShape,
    experts=st.integers(1, 512),
    intermediate_size=st.just(768),
    hidden_size=st.just(2048),
    top_k=st.integers(1, 12),
)
token_counts = st.integers(1, 20_000)


@given(shapes, token_counts)
def test_a_batch_runs_the_binary_of_its_representative(shape: MoEShape, tokens: int) -> None:
    assert _class(shape, representative_tokens(shape, tokens)) == _class(shape, tokens)


@given(shapes, token_counts)
def test_a_representative_is_no_larger_than_its_batch(shape: MoEShape, tokens: int) -> None:
    assert 1 <= representative_tokens(shape, tokens) <= tokens


@given(shapes, token_counts)
def test_a_representative_represents_itself(shape: MoEShape, tokens: int) -> None:
    representative = representative_tokens(shape, tokens)
    assert representative_tokens(shape, representative) == representative


@given(shapes)
def test_all_batch_sizes_of_a_layer_need_few_binaries(shape: MoEShape) -> None:
    powers = [1 << bit for bit in range(15)]
    assert len({representative_tokens(shape, tokens) for tokens in powers}) <= 9
