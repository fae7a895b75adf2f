"""Child of test_vllm_guard: compiles vLLM's kernel through its own launcher, for GPUs that are not here.

stdin: [[sm, quantization, [BLOCK_SIZE_M, N, K, warps, stages]], ...]. Last line of stdout: for each the shared memory
of its binary, and what our guard's formula says of that launch, both in bytes.
"""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

import torch
import triton

from sglang_moe_ext.core import Target, TileConfig
from sglang_moe_ext.engines import launch_shape
from sglang_moe_ext.engines.config_dict import tile_of
from sglang_moe_ext.engines.vllm import bootstrap, launch_args
from sglang_moe_ext.engines.vllm.installation import LAYER_MODULE
from sglang_moe_ext.engines.vllm.launch_args import config_dict_of
from sglang_moe_ext.gpu.shared_memory import smem_bytes
from sglang_moe_ext.kernels.compiled import TargetOnlyDriver

EXPERTS, COLUMNS, REDUCTION, TOKENS, TOP_K = 8, 512, 1024, 64, 2
DTYPES = {
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "fp8-tensor": torch.float8_e4m3fn,
    "fp8-block": torch.float8_e4m3fn,
}


class Compiled:
    """In the place of the engine's kernel: compiles what is launched, and keeps the binary."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.binary = kernel, None

    def __getitem__(self, grid: object) -> Any:
        def compile_instead(*arguments: Any, **named: Any) -> None:
            self.binary = self.kernel.warmup(*arguments, grid=(1,), **named)

        return compile_instead


def arguments_of(kind: str, tile: TileConfig) -> dict[str, Any]:
    """Of a launch of the up GEMM; its tensors have no storage."""

    def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    dtype, block = DTYPES[kind], [128, 128] if kind == "fp8-block" else None
    a_scale, b_scale = {
        "bf16": (None, None),
        "int8": (meta(TOKENS, 1), meta(EXPERTS, COLUMNS, 1)),
        "fp8-tensor": (meta(1), meta(EXPERTS)),
        "fp8-block": (meta(TOKENS, REDUCTION // 128), meta(EXPERTS, COLUMNS // 128, REDUCTION // 128)),
    }[kind]
    return {
        "A": meta(TOKENS, REDUCTION, dtype=dtype),
        "B": meta(EXPERTS, COLUMNS, REDUCTION, dtype=dtype),
        "C": meta(TOKENS, TOP_K, COLUMNS, dtype=torch.bfloat16),
        "A_scale": a_scale,
        "B_scale": b_scale,
        "topk_weights": meta(TOKENS, TOP_K),
        "sorted_token_ids": meta(1024, dtype=torch.int32),
        "expert_ids": meta(64, dtype=torch.int32),
        "num_tokens_post_padded": meta(1, dtype=torch.int32),
        "mul_routed_weight": False,
        "top_k": TOP_K,
        "config": config_dict_of(tile),
        "compute_type": triton.language.bfloat16,
        "use_fp8_w8a8": kind.startswith("fp8"),
        "use_int8_w8a8": kind == "int8",
        "use_int8_w8a16": False,
        "use_int4_w4a16": False,
        "per_channel_quant": kind == "int8",
        "block_shape": block,
    }


def main(asked: list[Any]) -> list[list[int]]:
    layer = bootstrap.import_engine(LAYER_MODULE)
    compiled = layer.fused_moe_kernel = Compiled(layer.fused_moe_kernel)
    swaps = "SWAP_AB" in inspect.signature(compiled.kernel.fn).parameters
    said = []
    for sm, kind, (block_m, block_n, block_k, warps, stages) in asked:
        triton.runtime.driver.set_active(TargetOnlyDriver(Target(sm)))
        compiled.kernel.device_caches.clear()  # which know one target
        # As the engine's own says it, which asks for the GPU that is here.
        layer.enable_swap_ab = lambda m, n, sm=sm: swaps and sm == 90 and m < 64 <= n
        arguments = arguments_of(kind, TileConfig(block_m, block_n, block_k, 1, warps, stages))
        layer.invoke_fused_moe_triton_kernel(**arguments)
        shape = launch_shape.shape_of(arguments)
        formula = smem_bytes(tile_of(launch_args.clamp_to_block(arguments["config"], shape)), shape, Target(sm))
        said.append([int(compiled.binary.metadata.shared), formula])
    return said


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
