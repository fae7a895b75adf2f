"""Which of SGLang's MoE backends read a table: only its Triton one does, and `auto` is not always that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sglang_moe_ext.core import Gpu, MoEShape

_READS_TABLES = "triton"
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Other:
    """Where `--moe-runner-backend auto` takes, or may take, another backend. Read in SGLang 0.5.23."""

    why: str
    applies: Callable[[MoEShape, Gpu, str], bool]


_OTHERS = (
    Other(
        "4-bit weights run Marlin on NVIDIA GPUs, which reads no table",
        lambda shape, gpu, architecture: shape.quantisation.scheme == "int4_w4a16",
    ),
    Other(
        "gpt-oss runs the triton_kernel backend, which reads no table, where it is available: "
        "--moe-runner-backend triton makes sure",
        lambda shape, gpu, architecture: architecture == "GptOssForCausalLM",
    ),
    Other(
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
