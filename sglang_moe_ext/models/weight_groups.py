"""What the readers of quantization sections share: bits, groups and blocks, and the refusal of other kernels."""

from __future__ import annotations

from sglang_moe_ext.core import CheckpointFormat, ModelError, Quantization, Scheme
from sglang_moe_ext.models.config_fields import Section, read_field, refusal, show, whole_number
from sglang_moe_ext.schemes import SCHEMES

WEIGHT_ONLY: dict[int, Scheme] = {
    row.weight_bits: row.name for row in SCHEMES.values() if row.name is not None and row.activation_bits == 16
}
"""By bits, schemes that leave activations in 16 bits."""
_NO_BLOCK = (None, 0, -1)


def refuse_other_kernel(method: str, source: str) -> ModelError:
    return refusal(
        source,
        f"experts quantized with {method} do not run the Triton kernel that JSON tables configure; "
        "give a bf16, fp8 or int8 checkpoint of the model, or state the experts with --shape",
    )


def weight_block(stated: object, name: str, source: str) -> tuple[int, int] | None:
    """(N, K) of a scale; None where none is stated, which ModelOpt also writes as [0, None]."""
    if stated is None:
        return None
    if not isinstance(stated, (list, tuple)) or len(stated) != 2:
        raise refusal(source, f"{name} is {show(stated)}, expected [N, K], such as [128, 128]; correct it")
    n, k = stated
    if n in _NO_BLOCK and k in _NO_BLOCK:
        return None
    return whole_number(n, f"{name} N", source), whole_number(k, f"{name} K", source)


def group_size(section: Section, source: str) -> int | None:
    """Weights along K that share a scale; None (also written -1) where a whole channel does."""
    for name in ("group_size", "q_group_size"):
        stated = read_field(section, name)
        if stated is not None:
            return None if stated == -1 else whole_number(stated, name, source)
    return None


def group_quantization(bits: object, group: int | None, stored: CheckpointFormat, source: str) -> Quantization:
    """Weights of 4 or 8 bits that the kernel unpacks; activations stay in 16."""
    scheme = WEIGHT_ONLY.get(bits) if isinstance(bits, int) else None
    if scheme is None:
        raise refusal(source, f"weights of {show(bits)} bits, expected 4 or 8; state the experts with --shape")
    if group is None:
        return Quantization(scheme, per_channel=True, checkpoint=stored)
    return Quantization(scheme, (0, group), checkpoint=stored)
