"""What the journal of a run in one engine says to another, whose kernel is of the same family."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace

from sglang_moe_ext.core import PROJECTIONS, MoEShape, Projection, StoreError, TileConfig
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.models import parse_shape
from sglang_moe_ext.tuning.bench.messages import Accuracy, BenchGemm, CheckAccuracy, GemmTimes
from sglang_moe_ext.tuning.run.journal_reader import Recording
from sglang_moe_ext.tuning.search import screening
from sglang_moe_ext.tuning.search.final_comparison import is_right
from sglang_moe_ext.tuning.search.screening import Times

_DEVICE_NAME = re.compile(r"[A-Za-z0-9][\w .()+-]{0,99}", re.ASCII)
_LONGEST_SHOWN = 80
_KERNEL = re.compile(r"(?P<title>\w+) (?P<version>\S+)'s own kernel, Triton (?P<triton>\S+)")


def escaped(value: object) -> str:
    """A value out of a file, on one line of bounded length."""
    text = ascii(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


@dataclass(frozen=True, slots=True)
class JournalSource:
    """Whose journal it is, with which Triton, of which layer on which GPU."""

    engine: EngineName
    version: str
    triton: str
    shape: MoEShape
    device_name: str
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TransferredConfig:
    """For one M: the configuration, and the microseconds of both GEMMs together in the engine that timed it."""

    config: TileConfig
    us: float


def source_of(journal: Recording) -> JournalSource:
    """What the circumstances of a journal say.

    Raises:
        StoreError: they are none of a measuring run.
    """
    stated = journal.circumstances
    kernel = _KERNEL.fullmatch(str(stated.get("kernel")))
    titles = {adapter.TITLE: name for name, adapter in ENGINES.items()}
    ep, fused = stated.get("ep"), stated.get("fused_shared")
    if kernel is None or kernel["title"] not in titles or not isinstance(ep, int) or not isinstance(fused, int):
        raise StoreError("its first line names no engine and layer that were measured: give a journal of our tune")
    gpu, seed = stated.get("gpu"), stated.get("seed", 0)
    if not isinstance(gpu, str) or not _DEVICE_NAME.fullmatch(gpu):
        raise StoreError(f"its first line names no GPU, but {escaped(gpu)}: expected a name as torch.cuda reports it")
    if type(seed) is not int:
        raise StoreError(f"its first line has a seed of {escaped(seed)}: expected a whole number")
    shape = replace(parse_shape(str(stated.get("shape"))), ep=ep, fused_shared=fused)
    return JournalSource(titles[kernel["title"]], kernel["version"], kernel["triton"], shape, gpu, seed)


def shape_in(engine: EngineName, source: JournalSource, fused_shared: int) -> MoEShape:
    """The same layer in the other engine: vLLM fuses no shared experts into the routed ones, SGLang may so many."""
    shape, theirs = source.shape, source.shape.fused_shared
    added = (fused_shared if engine == "sglang" else 0) - theirs
    return replace(shape, experts=shape.experts + added, top_k=shape.top_k + added, fused_shared=theirs + added)


def best_configs(journal: Recording, source: JournalSource, engine: EngineName) -> dict[int, TransferredConfig]:
    """For each M, what is fastest in both GEMMs together, without TMA and not known to be wrong."""
    wrong = set(_wrong(journal, source.shape))
    effective_config, quantization = ENGINES[engine].effective_config, source.shape.quantization
    found: dict[int, TransferredConfig] = {}
    for tokens, times in sorted(times_of(journal).items()):
        fit = (config for config in screening.rank_shared(times) if not config.use_tma and config not in wrong)
        if (config := next(fit, None)) is not None:
            us = sum(times[projection][config] for projection in PROJECTIONS)
            found[tokens] = TransferredConfig(effective_config(config, quantization), us)
    return found


def times_of(journal: Recording) -> dict[int, Times]:
    """The median of each configuration's samples, by M and GEMM; of two screens of one, the one with more samples."""
    samples: dict[int, dict[Projection, dict[TileConfig, tuple[float, ...]]]] = {}
    for request, result in journal.results.values():
        if isinstance(request, BenchGemm) and isinstance(result, GemmTimes):
            of_gemm = samples.setdefault(request.tokens, {it: {} for it in PROJECTIONS})[request.projection]
            for group, us in zip(request.groups, result.us, strict=True):
                config = request.key.with_group(group)
                if len(us) > len(of_gemm.get(config, ())):
                    of_gemm[config] = us
    return {
        tokens: {it: {config: statistics.median(us) for config, us in of.items()} for it, of in by_gemm.items()}
        for tokens, by_gemm in samples.items()
    }


def _wrong(journal: Recording, shape: MoEShape) -> Iterable[TileConfig]:
    for request, result in journal.results.values():
        if not isinstance(request, CheckAccuracy) or not isinstance(request.pair, dict):
            continue  # our own kernels run no tile of a table
        if isinstance(result, Accuracy) and not is_right(shape, result.error):
            yield from request.pair.values()
