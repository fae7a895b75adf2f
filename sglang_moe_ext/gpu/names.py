"""From what a user calls a GPU to its facts: device names, file-name forms, short names, MIG slices."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from sglang_moe_ext.core import Gpu, GpuError
from sglang_moe_ext.gpu import mig, specs

# What people write for the most common GPU of a family, or for a machine that has one kind of GPU.
_ALIASES = {
    "A100": "NVIDIA A100-SXM4-80GB",
    "A800": "NVIDIA A800-SXM4-80GB",
    "H100": "NVIDIA H100 80GB HBM3",
    "GH200": "NVIDIA GH200 480GB",
    "B300": "NVIDIA B300 SXM6 AC",
    "RTX 6000 Ada": "NVIDIA RTX 6000 Ada Generation",
    "RTX PRO 6000": "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
    "RTX PRO 5000": "NVIDIA RTX PRO 5000 Blackwell",
    "DGX Spark": "NVIDIA GB10",
    "H20 141GB": "NVIDIA H20-3e",
    "H20e": "NVIDIA H20-3e",
}

_OTHER_MEMORY = {"RTX 4090 48GB": ("NVIDIA GeForce RTX 4090", 48.0)}
"""Rebuilt cards, which the driver calls by the name of the original: (that name, GiB)."""

_BRANDS = re.compile(r"\b(nvidia|geforce|tesla|graphics|amd|instinct)\b ?")
_FORM_FACTORS = re.compile(r"\b(sxm\d?|hgx|dgx|nvl72|hbm\de?|oam|pcie)\b ?")
"""Words that tell apart no two GPUs of the table once the device names themselves did not match."""
_MEMORY = re.compile(r"(\d+) ?g(?:i?b)?")


_VGPU = re.compile(r"(?:NVIDIA |GRID )*(?P<whole>[\w .-]+?)-(?P<gib>\d{1,3})[ABCQ]", re.IGNORECASE)
"""A virtual GPU, as the driver of the guest names it: its multiprocessors are the whole GPU's, by turns."""


@dataclass(frozen=True, slots=True)
class UnsupportedGpu:
    """GPUs that the kernels do not run on, or that nothing is known about; `pattern` is searched in a plain name."""

    pattern: re.Pattern[str]
    what: str


_SUPPORTED = "expected one of the GPUs that --list-gpus prints"
UNSUPPORTED = (
    UnsupportedGpu(
        re.compile(r"\bamd\b|\binstinct\b|\bradeon\b|\bmi ?\d{2,3}[ax]?\b|\bgfx\d|\brx ?\d{4}"),
        "an AMD GPU that was not studied",
    ),
    UnsupportedGpu(re.compile(r"\bintel\b|\bgaudi|\barc [ab]\d|\bdata center gpu max\b"), "an Intel GPU"),
    UnsupportedGpu(re.compile(r"\bascend\b|\bnpu\b|\btpu\b|\bapple\b|\bmps\b|\bmusa\b|\bmtt\b"), "no NVIDIA GPU"),
    UnsupportedGpu(
        re.compile(r"\bt4g?\b|\bt10\b|\brtx ?20\d\d|\bgtx ?16\d\d|\btitan rtx\b|\bquadro rtx|\brtx 8000"),
        "a GPU of compute capability 7.5",
    ),
    UnsupportedGpu(re.compile(r"\bv100s?\b|\btitan v\b|\bgv100\b"), "a GPU of compute capability 7.0"),
    UnsupportedGpu(re.compile(r"\bp(4|6|40|100)\b|\bgtx ?10\d\d|\bm(40|60)\b|\bk(40|80)\b"), "a GPU older than 7.0"),
    UnsupportedGpu(re.compile(r"\borin\b"), "a GPU of compute capability 8.7, which was not studied"),
    UnsupportedGpu(
        re.compile(r"\bthor\b|\bjetson t[45]000\b|\bsm ?1(01|10)\b"),
        "a GPU of compute capability 11.0, which was not studied",
    ),
)


def find_gpu(name: str) -> Gpu:
    """The GPU that `name` means: a device name, its file-name form, a short name such as 4090, or a MIG slice of one.

    Raises:
        GpuError: no such GPU is known, it is not supported, or several are meant.
    """
    whole, profile = mig.split(name)
    for other, (original, memory_gib) in _OTHER_MEMORY.items():
        if _compact(_plain(name)) == _compact(_plain(other)):
            return replace(specs.known_gpus()[original], memory_gib=memory_gib)
    virtual = _VGPU.fullmatch(name.replace("_", " ").strip())
    if virtual is not None:
        gpu = specs.known_gpus()[_find_whole(virtual["whole"], name)]
        memory = float(virtual["gib"])
        return replace(
            gpu, device_name=virtual[0], memory_gib=memory, source=f"virtual {gpu.device_name}; {gpu.source}"
        )
    gpu = specs.known_gpus()[_find_whole(whole, name)]
    return gpu if profile is None else mig.slice_of(gpu, profile)


def _find_whole(name: str, stated: str) -> str:
    plain = _plain(name)
    found = _exact(plain)
    if found is not None:
        return found
    for kind in UNSUPPORTED:
        if kind.pattern.search(plain):
            raise GpuError(f"GPU {stated[:60]!r} is not supported: it is {kind.what}; {_SUPPORTED}")
    matches = _by_words(plain)
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = " or ".join(match.replace(" ", "_") for match in matches[:6])
        raise GpuError(f"GPU {stated[:60]!r} may be {names}: name one of them")
    raise _unknown(plain, stated)


def _plain(name: str) -> str:
    """RTX_4090, rtx-4090 and "NVIDIA GeForce RTX 4090" are one name."""
    words = re.sub(r"[\s_\-/()]+", " ", name.lower()).strip()
    return _BRANDS.sub("", words).strip()


def _exact(plain: str) -> str | None:
    """The GPU of that plain name, also where it has no spaces, or no "rtx" in front."""
    known = {_plain(full): full for full in specs.known_gpus()} | {_plain(a): full for a, full in _ALIASES.items()}
    compact = {_compact(name): full for name, full in known.items()}
    return known.get(plain) or compact.get(_compact(plain))


def _compact(plain: str) -> str:
    return plain.replace(" ", "").removeprefix("rtx")


def _by_words(plain: str) -> list[str]:
    """GPUs whose name has every word of `plain` but form factor and memory, which must fit; those with fewest others.

    A100 40GB is an SXM4 or a PCIe part: both are given.
    """
    words = set(_MEMORY.sub("", plain).split())
    amounts = [int(size) for size in _MEMORY.findall(plain)]
    if not any(any(letter.isdigit() for letter in word) for word in words if not _FORM_FACTORS.fullmatch(word)):
        return []
    extra: dict[str, int] = {}
    for full, gpu in specs.known_gpus().items():
        own = set(_plain(full).split())
        missing = {word for word in words - own if not _FORM_FACTORS.fullmatch(word)}
        other_form = "pcie" in own and "pcie" not in words and any(word.startswith("sxm") for word in words)
        no_pcie = "pcie" in words and "pcie" not in own
        if missing or other_form or no_pcie or not all(_has_memory(gpu, amount) for amount in amounts):
            continue
        unnamed = {word for word in own - words if not (_MEMORY.fullmatch(word) or _FORM_FACTORS.fullmatch(word))}
        extra[full] = len(unnamed - {"rtx", "generation"})
    return [full for full, count in extra.items() if count == min(extra.values())]


def _has_memory(gpu: Gpu, amount: int) -> bool:
    """Sizes in names and in sheets differ by a few units: 180 or 192 GB of a B200."""
    return gpu.memory_gib is not None and abs(gpu.memory_gib - amount) <= 0.07 * gpu.memory_gib


def _unknown(plain: str, stated: str) -> GpuError:
    known = {_plain(full): full for full in specs.known_gpus()} | {_plain(a): full for a, full in _ALIASES.items()}
    close = difflib.get_close_matches(plain[:100], known, n=3, cutoff=0.4)
    names = ", ".join(dict.fromkeys(known[match].replace(" ", "_") for match in close)) or "H200, RTX_4090, A100"
    return GpuError(
        f"unknown GPU {stated[:60]!r}: expected the name that torch.cuda reports, such as {names} (see --list-gpus)"
    )
