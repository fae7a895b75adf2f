"""What keeps a configuration from ending or corrupting a server: shared memory that is there, TMA where it is right."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sglang_moe_ext.core import Gpu, MoEShape, Projection, TileConfig
from sglang_moe_ext.engines import entries
from sglang_moe_ext.engines.entries import Entry
from sglang_moe_ext.engines.sglang import tma
from sglang_moe_ext.shared_memory import smem_bytes

log = logging.getLogger(__name__)

_FEWEST_STAGES, _SMALLEST_SIDE = 2, 32


def degraded(config: TileConfig) -> Iterator[TileConfig]:
    """Ever smaller ones: fewer stages, then a narrower N, then a shorter K, last one stage.

    BLOCK_SIZE_M stays: tokens are sorted into blocks of it. Halves of a BLOCK_SIZE_K divide what it divides, so a
    block of scales still holds whole tiles.
    """
    while config.num_stages > _FEWEST_STAGES:
        config = replace(config, num_stages=config.num_stages - 1)
        yield config
    while config.block_n > _SMALLEST_SIDE:
        config = replace(config, block_n=config.block_n // 2)
        yield config
    while config.block_k > _SMALLEST_SIDE:
        config = replace(config, block_k=config.block_k // 2)
        yield config
    if config.num_stages > 1:
        yield replace(config, num_stages=1)


@dataclass(frozen=True, slots=True)
class Guard:
    """The rules of one SGLang on one GPU; without a GPU that is known, only a launch tells what fits."""

    version: tuple[int, int, int]
    gpu: Gpu | None

    def safe(self, entry: Entry, shape: MoEShape, projection: Projection) -> Entry:
        """A fresh entry that this GPU can run and that computes what it should; most often a plain copy."""
        return fitting(self._right(entry, shape, projection), shape, self.gpu)

    def _right(self, entry: Entry, shape: MoEShape, projection: Projection) -> Entry:
        if entry.get(entries.USE_TMA):
            if tma.is_right(projection, shape.quantisation, self.version):
                return dict(entry)
            warn_once(
                f"USE_TMA of the {projection} projection is off for {shape}: "
                "this SGLang would end or compute wrong results with it"
            )
        return entries.without_tma(entry)


def fitting(entry: Entry, shape: MoEShape, gpu: Gpu | None) -> Entry:
    """The entry, or a smaller one where that asks for more shared memory than the GPU has a block."""
    config = entries.tile_of(entry)
    if gpu is None or (asked := smem_bytes(config, shape, gpu.sm)) <= gpu.smem_per_block:
        return entry
    smaller = next((it for it in degraded(config) if smem_bytes(it, shape, gpu.sm) <= gpu.smem_per_block), None)
    if smaller is None:
        return entry
    warn_once(
        f"{config} asks for {asked} B of shared memory for {shape}, {gpu.device_name} has {gpu.smem_per_block} B "
        f"a block: runs {smaller} instead"
    )
    return entries.resized(entry, smaller)


@functools.lru_cache(maxsize=4096)
def warn_once(text: str) -> None:
    """One line in the server's log, however often it is true."""
    log.warning("sglang-moe-ext: %s", text)
