"""Routing that a server really had: its dumped topk_ids, cut to the tokens of a batch and the experts of one rank."""

from __future__ import annotations

import functools
import io
import itertools
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.tuning import dumps
from sglang_moe_ext.tuning.routing import REMOTE, Routing, Source, routed_experts, weighted

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Captured:
    """Makes routings of captured rows.

    `stored` is what torch.save made of all rows, [rows, top_k] int32, ids of all ranks' experts with the fused shared
    ones after the routed: a tensor itself would go to other processes through shared memory, and containers have
    little. Table after table, each has the next of `lengths` rows.
    """

    name: str
    lengths: tuple[int, ...]
    stored: bytes = field(repr=False)

    def __call__(self, shape: MoEShape, tokens: int, seed: int, device: str) -> Routing:
        """Contiguous rows of tables in random order, at random offsets, as many tables as it takes.

        Of several ranks it is the one with most rows in this batch: a layer takes as long as its slowest rank.
        """
        import torch

        if tokens > sum(self.lengths):
            _tell_of_repetition(self.name, sum(self.lengths))
        rows = torch.load(io.BytesIO(self.stored), weights_only=True)
        ids = torch.cat([rows[start:end] for start, end in self._slices(tokens, random.Random(seed))])
        rank = busiest_rank(ids, shape)
        log.debug("%s: %d tokens as rank %d of %d sees them", self.name, tokens, rank, shape.ep)
        generator = torch.Generator(device=device).manual_seed(seed)
        return weighted(of_rank(ids, shape, rank).to(device), generator)

    def _slices(self, tokens: int, choice: random.Random) -> Iterator[tuple[int, int]]:
        ends = list(itertools.accumulate(self.lengths))
        tables = choice.sample(range(len(ends)), len(ends))
        for table in itertools.cycle(tables):
            rows = min(tokens, self.lengths[table])
            start = ends[table] - self.lengths[table] + choice.randint(0, self.lengths[table] - rows)
            yield start, start + rows
            tokens -= rows
            if not tokens:
                return


@functools.cache
def _tell_of_repetition(name: str, rows: int) -> None:
    log.warning("%s has %d rows: they repeat where a batch has more tokens; dump more for a truer one", name, rows)


# SGLang 0.5.15, srt/layers/moe: fused_moe_triton/layer.py puts each rank's routed experts in one contiguous range and
# the fused shared ones after them; token_dispatcher/standard.py maps the ids of a batch to that, others' to -1.
def of_rank(ids: torch.Tensor, shape: MoEShape, rank: int) -> torch.Tensor:
    """The same ids as the kernel on that rank sees them."""
    import torch

    local, routed = shape.experts - shape.fused_shared, routed_experts(shape)
    first = rank * local
    mine = (ids >= first) & (ids < first + local)
    shared = torch.where(ids >= routed, ids - routed + local, REMOTE)
    return torch.where(mine, ids - first, shared)


def busiest_rank(ids: torch.Tensor, shape: MoEShape) -> int:
    """The rank whose routed experts are taken most often; the first of those that are alike."""
    routed = ids[ids < routed_experts(shape)]
    return int((routed // (shape.experts - shape.fused_shared)).bincount(minlength=shape.ep).argmax())


def source(folder: Path, shape: MoEShape) -> Source:
    """The routing that a server of this layer dumped there; its name follows from the files' names and contents.

    Raises:
        ModelError: a file has ids that this layer cannot have.
        MoEExtError: there is no dump, or a file cannot be read as one.
    """
    import torch

    digest, tables = dumps.read(folder, shape)
    name = f"captured {digest}" + (f" as the busiest of {shape.ep} ranks sees it" if shape.ep > 1 else "")
    stored = io.BytesIO()
    torch.save(torch.cat(tables), stored)
    return Source(name, (Captured(name, tuple(map(len, tables)), stored.getvalue()),))
