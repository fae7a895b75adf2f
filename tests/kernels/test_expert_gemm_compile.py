"""What `kernels.grouped_gemm` needs, compiled without a GPU; the offline binary is the one that a launch asks for."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter", allow_module_level=True)

from sglang_moe_ext.core import CompileJob, MoEShape, Quantization, Resources, Target
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.kernels import expert_gemm
from sglang_moe_ext.kernels.expert_gemm_compile import compile_job, compile_signature
from sglang_moe_ext.tables.grouped_gemm_table import GroupedGemmKey

BLOCK = Quantization("fp8_w8a8", (128, 128))
SHAPES = {
    "bfloat16": MoEShape(64, 1536, 4096, 8),
    "float32": MoEShape(64, 1536, 4096, 8, dtype="float32"),
    "fp8_w8a8 block": MoEShape(64, 1536, 4096, 8, BLOCK),
    "int8_w8a16": MoEShape(64, 1536, 4096, 8, Quantization("int8_w8a16", per_channel=True)),
    "int8_w8a8": MoEShape(64, 1536, 4096, 8, Quantization("int8_w8a8", per_channel=True)),
}
# Shared memory of the default tile for 2,048 rows and for 65,536, in bytes; Triton 3.7.1, compiled for sm_89, which has
# 101,376 for a block and is the smallest that the project tunes for.
BUDGET_SM89 = 101_376


@pytest.mark.parametrize("rows", [2048, 65_536])
@pytest.mark.parametrize("name", SHAPES)
def test_the_default_tile_fits_a_small_gpu_and_spills_nothing(name: str, rows: int) -> None:
    shape = SHAPES[name]
    key = GroupedGemmKey(4096, shape.quantization.scheme or shape.dtype, shape.quantization.block_shape)
    tile = expert_gemm.default_config(rows, shape.experts, key).compile_key
    needs = compile_job(CompileJob(shape, "up", rows, tile, Target(89)))
    assert isinstance(needs, Resources), needs
    assert needs.smem_bytes <= BUDGET_SM89 and needs.spill_bytes == 0, needs


def test_the_offline_signature_is_that_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, seen = SHAPES["bfloat16"], {}
    monkeypatch.setattr(expert_gemm, "launch", lambda kernel, grid, arguments: seen.update(arguments))
    config = expert_gemm.default_config(2048, 64, GroupedGemmKey(4096, "bfloat16"))
    with torch.device("meta"):
        a, b = torch.empty(2048, 4096, dtype=torch.bfloat16), torch.empty(64, 3072, 4096, dtype=torch.bfloat16)
        expert_gemm.grouped_gemm(a, b, torch.empty(65, dtype=torch.int32), config=config)
    asked = compile_signature(shape, config.compile_key)
    assert {name: seen[name] for name in asked.constexprs} == asked.constexprs
    assert asked.options == {name: seen[name] for name in asked.options}


def test_every_known_gpu_has_the_memory_of_the_budget() -> None:
    assert all(gpu.smem_per_block >= BUDGET_SM89 for gpu in specs.known_gpus().values() if gpu.sm >= 89)
