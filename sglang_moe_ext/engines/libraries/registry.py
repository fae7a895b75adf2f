"""The libraries that are known, by the name that a flag gives them."""

from __future__ import annotations

from sglang_moe_ext.engines.libraries.deep_gemm import DeepGemm
from sglang_moe_ext.engines.libraries.flashinfer_cutlass import FlashinferCutlass
from sglang_moe_ext.engines.libraries.layer_library import LayerLibrary
from sglang_moe_ext.engines.libraries.quack import Quack
from sglang_moe_ext.engines.libraries.torch_grouped import TorchGrouped
from sglang_moe_ext.engines.libraries.triton_kernels import TritonKernels

LIBRARIES: dict[str, LayerLibrary] = {
    "triton_kernels": TritonKernels(),
    "deep_gemm": DeepGemm(),
    "quack": Quack(),
    "flashinfer": FlashinferCutlass(),
    "torch": TorchGrouped(),
}
