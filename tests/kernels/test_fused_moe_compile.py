"""Our kernel needs the memory that the engine's needs, tile by tile; the offline binary is the one that is launched."""

import copy
import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sglang_moe_ext.core import CompileKey, MoEExtError, MoEShape, Projection, Quantization, Target, TileConfig
from sglang_moe_ext.kernels import fused_moe
from sglang_moe_ext.kernels.compiled import TargetOnlyDriver, resources_of
from sglang_moe_ext.kernels.fused_moe import fused_moe_kernel
from sglang_moe_ext.kernels.fused_moe_compile import compile_signature
from sglang_moe_ext.kernels.quantize import Scales
from sglang_moe_ext.kernels.reference import moe_align

QUANTIZATIONS = {"bf16": Quantization(), "fp8": Quantization("fp8_w8a8", (128, 128))}
TOLERANCE_BYTES = 1126

# metadata.shared of fused_moe_kernel of sglang 0.5.23, compiled through its own launcher; Triton 3.7.1, 2026-11-21;
# up of E=65 N=3072 K=2048 top-5, fp8 block-wise [128, 128]. None of them spills, and the down kernels need the same.
ENGINE_SMEM_BYTES = [
    (89, "bf16", CompileKey(16, 64, 128, 4, 4), 61_440),
    (89, "bf16", CompileKey(32, 128, 64, 4, 3), 40_960),
    (89, "bf16", CompileKey(64, 64, 64, 4, 4), 49_152),
    (89, "bf16", CompileKey(64, 128, 64, 4, 3), 49_152),
    (89, "bf16", CompileKey(128, 128, 64, 8, 3), 65_536),
    (89, "bf16", CompileKey(128, 256, 64, 8, 4), 147_456),
    (89, "fp8", CompileKey(16, 64, 128, 4, 4), 30_720),
    (89, "fp8", CompileKey(16, 128, 128, 4, 3), 36_864),
    (89, "fp8", CompileKey(32, 128, 64, 4, 4), 30_720),
    (89, "fp8", CompileKey(64, 128, 128, 4, 3), 49_152),
    (89, "fp8", CompileKey(128, 64, 128, 4, 3), 49_664),
    (89, "fp8", CompileKey(128, 128, 128, 8, 4), 98_304),
    (90, "bf16", CompileKey(16, 64, 128, 4, 4), 61_440),
    (90, "bf16", CompileKey(32, 128, 64, 4, 3), 40_960),
    (90, "bf16", CompileKey(64, 64, 64, 4, 4), 65_536),
    (90, "bf16", CompileKey(64, 128, 64, 4, 3), 73_728),
    (90, "bf16", CompileKey(128, 128, 64, 8, 3), 98_304),
    (90, "bf16", CompileKey(128, 256, 64, 8, 4), 196_608),
    (90, "fp8", CompileKey(16, 64, 128, 4, 4), 40_960),
    (90, "fp8", CompileKey(16, 128, 128, 4, 3), 55_296),
    (90, "fp8", CompileKey(32, 128, 64, 4, 4), 40_960),
    (90, "fp8", CompileKey(64, 128, 128, 4, 3), 73_728),
    (90, "fp8", CompileKey(128, 64, 128, 4, 3), 74_240),
    (90, "fp8", CompileKey(128, 128, 128, 8, 4), 131_072),
]


def glm_flash(quantization: str) -> MoEShape:
    return MoEShape(65, 1536, 2048, 5, QUANTIZATIONS[quantization])


def compiled(shape: MoEShape, projection: Projection, key: CompileKey, sm: int) -> Any:
    ours = compile_signature(shape, projection, key, Target(sm))
    source = ASTSource(ours.fn, ours.signature, ours.constexprs, ours.attrs)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=ours.options)


@pytest.mark.parametrize(("sm", "quantization", "key", "engine_bytes"), ENGINE_SMEM_BYTES, ids=str)
def test_memory_is_the_engines_and_nothing_spills(
    sm: int, quantization: str, key: CompileKey, engine_bytes: int
) -> None:
    needs = resources_of(compiled(glm_flash(quantization), "up", key, sm))
    assert abs(needs.smem_bytes - engine_bytes) <= TOLERANCE_BYTES
    assert needs.spill_bytes == 0


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("projection", ["up", "down"])
def test_the_offline_binary_is_the_one_that_a_launch_compiles(
    projection: Projection, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    run = fused_moe_kernel.run
    monkeypatch.setattr(fused_moe, "_sm", lambda device: 90)
    monkeypatch.setattr(
        fused_moe_kernel, "run", lambda *a, warmup, **k: launched.append(run(*a, warmup=True, **k)), raising=False
    )
    config = TileConfig(16, 64, 128, 8, 4, 3)
    monkeypatch.setattr(triton.runtime.driver, "_active", TargetOnlyDriver(Target(90)))
    monkeypatch.setattr(fused_moe_kernel, "device_caches", copy.copy(fused_moe_kernel.device_caches))
    launch_on_meta(glm_flash(quantization), projection, config)
    offline = compiled(glm_flash(quantization), projection, config.compile_key, 90)
    assert launched[0].asm["ptx"] == offline.asm["ptx"]


def launch_on_meta(shape: MoEShape, projection: Projection, config: TileConfig) -> None:
    """The launcher as a server calls it, 64 tokens, on tensors without storage."""
    columns, k = shape.gemm(projection)
    down = projection == "down"
    rows, top_k = (64 * shape.top_k, 1) if down else (64, shape.top_k)
    with torch.device("meta"):
        stored, scales = torch.bfloat16, None
        if shape.quantization.scheme is not None:
            a_scale = torch.empty(rows, k // 128)
            stored = torch.float8_e4m3fn
            scales = Scales(shape.quantization, a_scale, torch.empty(shape.experts, columns // 128, k // 128))
        fused_moe.fused_moe_gemm(
            torch.empty(rows, k, dtype=stored),
            torch.empty(shape.experts, columns, k, dtype=stored),
            torch.empty(64, shape.top_k, columns, dtype=torch.bfloat16),
            moe_align(torch.empty(64, shape.top_k, dtype=torch.int32), config.block_m, shape.experts),
            config,
            top_k=top_k,
            scales=scales,
            routed_weights=torch.empty(64, shape.top_k) if down else None,
        )


def test_a_configuration_with_tma_is_refused() -> None:
    with pytest.raises(MoEExtError, match="USE_TMA"):
        compile_signature(glm_flash("bf16"), "up", CompileKey(64, 64, 64, 4, 3, use_tma=True), Target(90))


def test_a_scheme_that_the_kernel_cannot_do_is_refused() -> None:
    shape = MoEShape(64, 1536, 2048, 4, Quantization("int4_w4a16", (0, 128)))
    with pytest.raises(MoEExtError, match="int4_w4a16"):
        compile_signature(shape, "up", CompileKey(64, 64, 64, 4, 3), Target(90))


@pytest.mark.parametrize("block_m", [32, 128])
@pytest.mark.parametrize(
    "quantization", [Quantization("int8_w8a8", per_channel=True), Quantization("fp8_w8a8")], ids=str
)
def test_the_other_schemes_compile_without_spilling(quantization: Quantization, block_m: int) -> None:
    shape = MoEShape(65, 1536, 2048, 5, quantization)
    kernel = compiled(shape, "down", CompileKey(block_m, 64, 128, 4, 3), 90)
    assert resources_of(kernel).spill_bytes == 0
