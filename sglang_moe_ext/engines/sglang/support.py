"""Which of SGLang's MoE backends read a table: only its Triton one does, and `auto` is not always that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sglang_moe_ext.core import PROJECTIONS, Gpu, MoEShape, Projection, Quantization

_READS_TABLES = "triton"
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class OtherBackend:
    """Where `--moe-runner-backend auto` takes, or may take, another backend. Read in SGLang 0.5.23."""

    why: str
    applies: Callable[[MoEShape, Gpu, str], bool]


_OTHERS = (
    OtherBackend(
        "4-bit weights run Marlin on NVIDIA GPUs, which reads no table",
        lambda shape, gpu, architecture: shape.quantization.scheme == "int4_w4a16",
    ),
    OtherBackend(
        "gpt-oss runs the triton_kernel backend, which reads no table, where it is available: "
        "--moe-runner-backend triton makes sure",
        lambda shape, gpu, architecture: architecture == "GptOssForCausalLM",
    ),
    OtherBackend(
        "on this GPU `auto` takes FlashInfer for several models, which reads no table: "
        "--moe-runner-backend triton makes sure (the server's log names its choice)",
        lambda shape, gpu, architecture: gpu.sm in (100, 103),
    ),
)


def why_no_table(backend: str, shape: MoEShape, gpu: Gpu, architecture: str) -> str | None:
    """Why a server with that `--moe-runner-backend` does not, or may not, read a table for the layer; None: it does.

    `architecture` is the model's, empty where it is not known.
    """
    if backend == _READS_TABLES:
        return None
    if backend != AUTO:
        return f"--moe-runner-backend {backend} reads no table; triton does"
    return next((other.why for other in _OTHERS if other.applies(shape, gpu, architecture)), None)


_FIRST_SM = 90
FIRST_WITH_UP_TMA = (0, 5, 18)
"""Up to 0.5.17 a USE_TMA in the table of the up GEMM reaches the kernel as an argument that it does not have."""


def gemms_with_tma(quantization: Quantization, version: tuple[int, int, int], sm: int) -> tuple[Projection, ...]:
    """The GEMMs that run right with USE_TMA in that SGLang, on a GPU of that architecture."""
    return tuple(it for it in PROJECTIONS if sm >= _FIRST_SM and is_right(it, quantization, version))


def is_right(projection: Projection, quantization: Quantization, version: tuple[int, int, int]) -> bool:
    """Whether that GEMM with USE_TMA computes in that SGLang what it computes without."""
    return up_tma_is_right(quantization, version) if projection == "up" else down_tma_is_right(quantization)


def down_tma_is_right(quantization: Quantization) -> bool:
    """Whether a down GEMM with USE_TMA computes what it computes without.

    It reads its rows by descriptor, so the layer keeps them in the order of the experts, padded to whole blocks whose
    rows nobody wrote. fused_moe_kernel then reads

    - rows of 16 bits (no scheme, int8_w8a16 per channel): right, no scale goes with a row. The kernel asserts
      block-wise fp8 there, which a compiled kernel checks under TRITON_DEBUG alone;
    - scales of blocks (fp8_w8a8, int8_w8a8): right, looked up in the order of the experts;
    - scales of rows (fp8_w8a8 and int8_w8a8 per channel): WRONG, looked up in the order of the pairs;
    - the scale of the tensor (fp8_w8a8): WRONG where it is dynamic, its maximum is taken over unwritten rows too. It is
      right where the checkpoint states the scale, which a `Quantization` does not tell.

    Groups along K (int4_w4a16, int8_w8a16) run fused_moe_kernel_gptq_awq, which knows no TMA and keeps rows in the
    order of the pairs: nothing to win, and WRONG once the activation, told that rows lie in the order of the experts,
    leaves out rows: those of experts elsewhere, and since 0.5.23 all that pad a block.
    """
    return quantization.scales in quantization.row.down_tma


def up_tma_is_right(quantization: Quantization, version: tuple[int, int, int]) -> bool:
    """Whether an up GEMM with USE_TMA runs in that SGLang and computes what it computes without.

    Weights alone come by descriptor, and their scales belong to columns: right with every scheme. Groups along K run
    fused_moe_kernel_gptq_awq, which ignores it; no candidate for them need ask.
    """
    in_groups = quantization.block_shape is not None and not quantization.is_block_wise
    return version >= FIRST_WITH_UP_TMA and not in_groups
