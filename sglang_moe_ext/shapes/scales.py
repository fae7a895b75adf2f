"""What the scales of quantised weights have in common, whatever method wrote them."""

from __future__ import annotations

from sglang_moe_ext.core import ModelError, Quantisation, Scheme
from sglang_moe_ext.shapes.fields import Section, read, refusal, shown, whole

EXCLUSIONS = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
NO_BLOCK = (None, 0, -1)
WEIGHT_ONLY: dict[int, Scheme] = {4: "int4_w4a16", 8: "int8_w8a16"}


def other_kernel(method: str, source: str) -> ModelError:
    return refusal(
        source,
        f"experts quantised with {method} do not run the Triton kernel that JSON tables configure; "
        "give a bf16, fp8 or int8 checkpoint of the model, or state the experts with --shape",
    )


def weight_block(stated: object, name: str, source: str) -> tuple[int, int] | None:
    """(N, K) of a scale; None where none is stated, which ModelOpt also writes as [0, None]."""
    if stated is None:
        return None
    if not isinstance(stated, (list, tuple)) or len(stated) != 2:
        raise refusal(source, f"{name} is {shown(stated)}, expected [N, K], such as [128, 128]; correct it")
    n, k = stated
    if n in NO_BLOCK and k in NO_BLOCK:
        return None
    return whole(n, f"{name} N", source), whole(k, f"{name} K", source)


def group_size(section: Section, source: str) -> int | None:
    """Weights along K that share a scale; None (also written -1) where a whole channel does."""
    for name in ("group_size", "q_group_size"):
        stated = read(section, name)
        if stated is not None:
            return None if stated == -1 else whole(stated, name, source)
    return None


def in_groups(bits: object, group: int | None, source: str) -> Quantisation:
    """Weights of 4 or 8 bits that the kernel unpacks; activations stay in 16."""
    scheme = WEIGHT_ONLY.get(bits) if isinstance(bits, int) else None
    if scheme is None:
        raise refusal(source, f"weights of {shown(bits)} bits, expected 4 or 8; state the experts with --shape")
    return Quantisation(scheme, per_channel=True) if group is None else Quantisation(scheme, (0, group))


def experts_left_out(section: Section) -> bool:
    """True where an exclusion covers the experts of every layer: it names experts, and not shared ones or a layer."""
    for name in EXCLUSIONS:
        excluded = read(section, name)
        for entry in excluded if isinstance(excluded, (list, tuple)) else ():
            if isinstance(entry, str) and not _is_narrower(entry):
                return True
    return False


def names_experts(pattern: str) -> bool:
    """True where a pattern speaks of routed experts; one with a negative lookahead speaks of all the rest.

    Patterns are not run: one written by a stranger may never end.
    """
    return "experts" in pattern and "shared" not in pattern and "(?!" not in pattern


def _is_narrower(entry: str) -> bool:
    return not names_experts(entry) or any(letter.isdigit() for letter in entry.replace("[0-9]", ""))
