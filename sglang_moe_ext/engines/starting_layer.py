"""What a starting server says of its MoE layer: flags of `tune`, batch sizes that it can ask for, and its GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LARGEST_TOKENS = 16384
"""Larger batches run the entry of this one: every expert has whole tiles of rows long before."""
_BETWEEN = 1.25
"""A CUDA graph's size is tuned beside the powers of two where it is so much larger than one, and smaller than the
next."""


@dataclass(frozen=True, slots=True)
class StartingLayer:
    """A model as one server is about to load it.

    `flags`: what tells `sglang-moe-ext tune` which layer that is. `tokens`: the batch sizes to tune. `gpus`: indices of
    the GPUs of all ranks that this process sees, its own among them. `config`: the folder, or the hub's name, that the
    model comes from.
    """

    flags: tuple[str, ...]
    tokens: tuple[int, ...]
    gpus: tuple[int, ...]
    device_name: str
    config: str


def choose_batch_sizes(graph_sizes: Iterable[int], largest: int) -> tuple[int, ...]:
    """Batch sizes to tune, for a server that asks for 1 to `largest` tokens, and often for `graph_sizes`.

    Powers of two, the largest of each kind, and of each octave the graph size nearest to its middle: every number of
    tokens is within a factor of two of an entry, as a table covers it.
    """
    graphs = sorted({size for size in graph_sizes if 1 <= size <= LARGEST_TOKENS})
    most = min(LARGEST_TOKENS, max(largest, 1, *graphs[-1:]))
    powers = [1 << exponent for exponent in range(most.bit_length()) if 1 << exponent <= most]
    chosen = {*powers, most, *graphs[-1:]}
    for low in powers:
        inside = [size for size in graphs if _BETWEEN * low <= size <= 2 * low / _BETWEEN]
        if inside and not any(low < size < 2 * low for size in chosen):
            chosen.add(min(inside, key=lambda size: abs(size - 1.5 * low)))
    return tuple(sorted(chosen))


def group_gpus(own: int, base: int, step: int, ranks: int, visible: int) -> tuple[int, ...]:
    """The GPUs of a group of ranks, the one of this process among them; that one alone where the sum does not work out.

    Groups of `ranks` GPUs follow each other from `base` on, each GPU `step` after the one before.
    """
    if min(step, ranks) < 1 or own < base or (own - base) % step:
        return (own,)
    first = own - (own - base) % (ranks * step)
    found = tuple(range(first, first + ranks * step, step))
    return found if found[-1] < visible else (own,)
