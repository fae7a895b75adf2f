"""Which of SGLang's MoE backends read a table: only its Triton one does, and `auto` is not always that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sglang_moe_ext import env
from sglang_moe_ext.core import PROJECTIONS, CheckpointFormat, Gpu, MoEShape, Projection, Quantization
from sglang_moe_ext.engines.backend_answer import AskedBackend
from sglang_moe_ext.engines.weight_only import is_weight_only, marlin_takes
from sglang_moe_ext.untrusted import show

Version = tuple[int, int, int]
NEWEST: Version = (0, 5, 23)
"""The newest release whose choice of a backend was read."""
AUTO = "auto"
_READS_TABLES = "triton"
_SM100 = (100, 103)
_FIRST_WITH_TRITON_FLAG: Version = (0, 5, 11)
"""From there on `--moe-runner-backend triton` runs weights of 4 bits of compressed-tensors by Triton."""
_FIRST_WITH_TRITON_ON_SM100: Version = (0, 5, 20)
"""From there on `auto` does so on sm_100 and sm_103; get_moe_scheme of 0.5.20 and 0.5.23 was run for both."""
_TRITON_GROUPS = (32, 128)
_TRTLLM_GROUP = 32
_TRTLLM_ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "KimiK25ForConditionalGeneration")
"""Their int4 experts in groups of 32 run FlashInfer by the server's own override (arg_groups/overrides.py)."""
_AS_READ = "as read in SGLang 0.5.8 to 0.5.23, not asked of the engine"


@dataclass(frozen=True, slots=True)
class ServedLayer:
    """What SGLang chooses a backend by: the server's flag, the layer, the GPU, the model's class and the release."""

    backend: str
    shape: MoEShape
    gpu: Gpu
    architecture: str
    version: Version

    @property
    def stored(self) -> CheckpointFormat | None:
        """What the checkpoint says of its weights; None where a user stated the layer."""
        return self.shape.quantization.checkpoint


def why_no_table(
    backend: str,
    shape: MoEShape,
    gpu: Gpu,
    architecture: str,
    version: Version = NEWEST,
    asked: AskedBackend | None = None,
) -> str | None:
    """Why a server with that `--moe-runner-backend` does not, or may not, read a table for the layer; None: it does.

    `architecture` is the model's, empty where it is not known. `asked`: what the engine itself said, if it was asked.
    """
    layer = ServedLayer(backend, shape, gpu, architecture, version)
    if asked is not None and not _needs_fp8_units(layer):
        if asked.reads_tables:
            return None
        release = ".".join(map(str, version))
        return f"it runs {asked.name}, which reads no table{_advise(layer)} (asked SGLang {release}: {asked.method})"
    found = next((find(layer) for applies, find in _KINDS if applies(layer)), None)
    return None if found is None else f"{found} ({_AS_READ})"


def _advise(layer: ServedLayer) -> str:
    """What makes Triton run, where something does."""
    method = None if layer.stored is None else layer.stored.method
    if method in ("awq", "gptq"):
        return f": {_WNA16}"
    if is_weight_only(layer.shape.quantization):
        return f": {_TRITON_FLAG}" if _is_readable(layer) and layer.version >= _FIRST_WITH_TRITON_FLAG else ""
    return f": {_TRITON_FLAG}"


_TRITON_FLAG = "--moe-runner-backend triton runs Triton, which reads one"


def _is_readable(layer: ServedLayer) -> bool:
    """Whether the Triton scheme of compressed-tensors takes such weights."""
    stored = layer.stored
    return stored is not None and (
        stored.bits == 4 and stored.group in _TRITON_GROUPS and stored.symmetric and not stored.activation_order
    )


def _needs_fp8_units(layer: ServedLayer) -> bool:
    return layer.shape.quantization.scheme == "fp8_w8a8" and layer.gpu.fp8_tflops is None


def _explain_fp8(layer: ServedLayer) -> str | None:
    return (
        f"{layer.gpu.device_name} ({layer.gpu.target}) has no fp8 matrix units, which begin with "
        f"{'gfx942' if layer.gpu.target.is_amd else 'sm_89'}: Triton refuses or emulates the kernel there"
    )


def _explain_amd(layer: ServedLayer) -> str | None:
    """AMD's own images set the variable; without it `auto` takes Triton there."""
    if layer.backend == _READS_TABLES:
        return None
    if layer.backend != AUTO:
        return _explain_flag(layer)
    if not env.is_on(env.SGLANG_AITER):
        return None
    return f"{env.SGLANG_AITER} is on here, with which AITER runs the experts and reads no table: {_TRITON_FLAG}"


def _explain_weight_only(layer: ServedLayer) -> str | None:
    """Its own methods choose by the checkpoint; the flag is asked by one of them."""
    match layer.stored:
        case CheckpointFormat(method="compressed_tensors"):
            return _explain_compressed_tensors(layer, layer.stored)
        case CheckpointFormat(method="moe_wna16"):
            return None
        case CheckpointFormat(method="gptq"):
            return "GPTQ experts of 4 and 8 bits run Marlin, which reads no table: " + _WNA16
        case _ if marlin_takes(layer.shape, pads_columns=False):
            whose = "" if layer.stored is not None else ", unless they are compressed-tensors' that run Triton"
            bits = layer.shape.quantization.weight_bits
            advice = f": {_WNA16}" if layer.stored is None or layer.stored.method == "awq" else ""
            return f"weights of {bits} bits run Marlin{whose}, which reads no table{advice}"
        case _:
            return None


_WNA16 = "--quantization moe_wna16 makes an AWQ or symmetric GPTQ checkpoint run Triton"


def _explain_compressed_tensors(layer: ServedLayer, stored: CheckpointFormat) -> str | None:
    is_readable = _is_readable(layer)
    if layer.architecture in _TRTLLM_ARCHITECTURES and stored.group == _TRTLLM_GROUP and layer.gpu.sm in _SM100:
        return None if layer.backend == _READS_TABLES else "the server itself takes FlashInfer for such experts here"
    by_flag = layer.backend == _READS_TABLES and layer.version >= _FIRST_WITH_TRITON_FLAG
    by_auto = layer.backend == AUTO and layer.gpu.sm in _SM100 and layer.version >= _FIRST_WITH_TRITON_ON_SM100
    if is_readable and (by_flag or by_auto):
        return None
    if by_flag:
        return "Triton takes weights of compressed-tensors in 4 bits, symmetric, in groups of 32 or 128 alone"
    can = is_readable and layer.version >= _FIRST_WITH_TRITON_FLAG
    advice = f": {_TRITON_FLAG}" if can else ""
    return f"weights of {stored.bits} bits run Marlin, which reads no table{advice}"


def _explain_flag(layer: ServedLayer) -> str | None:
    return f"--moe-runner-backend {show(layer.backend)} reads no table; triton does"


_KINDS: tuple[tuple[Callable[[ServedLayer], bool], Callable[[ServedLayer], str | None]], ...] = (
    (_needs_fp8_units, _explain_fp8),
    (lambda layer: layer.gpu.target.is_amd, _explain_amd),
    (lambda layer: is_weight_only(layer.shape.quantization), _explain_weight_only),
    (lambda layer: layer.backend == _READS_TABLES, lambda layer: None),
    (lambda layer: layer.backend != AUTO, _explain_flag),
    (
        lambda layer: layer.architecture == "GptOssForCausalLM",
        lambda layer: (
            "gpt-oss runs the triton_kernel backend, which reads no table, where the package triton_kernels is "
            f"installed: {_TRITON_FLAG}"
        ),
    ),
    (
        lambda layer: layer.gpu.sm in _SM100,
        lambda layer: (
            "on this GPU `auto` takes FlashInfer for some architectures and Triton for others, and which it takes for "
            f"this one is not known: {_TRITON_FLAG}"
        ),
    ),
)
"""The first kind that a layer is of decides."""


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
    rows are not written. fused_moe_kernel then reads

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
