"""Routing captured from a server: its dumped topk_ids, cut to the tokens of a batch and the experts of one rank."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import logging
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_moe_ext.core import ModelError, MoEExtError, MoEShape
from sglang_moe_ext.tuning.bench import torch_file
from sglang_moe_ext.tuning.bench.routing import REMOTE, Routing, RoutingSource, routed_experts, weighted
from sglang_moe_ext.untrusted import read_regular_file, show

if TYPE_CHECKING:
    import torch

# As upstream's benchmark/kernels/fused_moe_triton/README.md has a server name its dumps.
_UPSTREAMS = re.compile(r"topk_ids_layer\d+_idx\d+\.pt")
_OURS = ".safetensors"
_EXPECTED = f"files topk_ids_layer<L>_idx<I>.pt or *{_OURS}"
_INTEGERS = ("torch.uint8", "torch.int16", "torch.int32", "torch.int64")
_MOST_BYTES = 1 << 30
"""Of one file; 8 ids of 4 bytes for 32,768 tokens in each of 60 layers are 63 MB."""
_MOST_HEADER_BYTES = 1 << 18
"""Of a safetensors file; a tensor of one layer takes about 100."""
_ENOUGH_ROWS = 1 << 20
"""64 batches of the largest M that is tuned; what goes to the measuring processes stays small."""


def read(folder: Path, shape: MoEShape) -> tuple[str, list[torch.Tensor]]:
    """A digest of all files' names and contents, and tables [rows, top_k] int32, none empty, of enough of the files.

    Ids are those of all ranks' experts, the fused shared ones after the routed.

    Raises:
        ModelError: a file has ids that this layer cannot have.
        MoEExtError: there is no dump, or a file cannot be read as one.
    """
    digests: dict[str, str] = {}
    tables: list[torch.Tensor] = []
    paths = _list_files(folder)
    for path in random.Random(0).sample(paths, len(paths)):  # early files alone would be early requests alone
        content = _read_file(path)
        digests[path.name] = hashlib.sha256(content).hexdigest()
        if sum(map(len, tables)) < _ENOUGH_ROWS:
            named = _parse_safetensors(path, content) if path.suffix == _OURS else _parse_torch_file(path, content)
            tables += [_check_ids(tensor, name, shape) for name, tensor in named.items()]
    tables = [table for table in tables if len(table)]
    if not tables:
        raise MoEExtError(f"{folder}: its dumps have no tokens; dump topk_ids again while the server has requests")
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:12], tables


def _list_files(folder: Path) -> list[Path]:
    try:
        paths = [path for path in folder.iterdir() if path.suffix == _OURS or _UPSTREAMS.fullmatch(path.name)]
        found = sorted(path for path in paths if path.is_file())
    except OSError as error:
        raise MoEExtError(f"cannot read {folder}: {error.strerror}; --topk-ids-dir takes a folder") from error
    if not found:
        raise MoEExtError(f"{folder} has no captured topk_ids: expected {_EXPECTED}")
    return found


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise MoEExtError(f"{path} is larger than {_MOST_BYTES >> 30} GiB: expected topk_ids alone; remove it")
        return read_regular_file(path, _MOST_BYTES)
    except OSError as error:
        raise MoEExtError(f"cannot read {path}: {error.strerror}; remove it, or capture it again") from error


def _parse_torch_file(path: Path, content: bytes) -> dict[str, torch.Tensor]:
    import torch

    try:
        torch_file.check(content)
        tensor = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:
        reason = show(str(error).partition("\n")[0] or type(error).__name__)
        raise MoEExtError(
            f"{path} is no tensor that torch.save wrote ({reason}); dump it again, the tensor alone"
        ) from error
    if not _is_plain(tensor):
        raise MoEExtError(f"{path} has a {type(tensor).__name__}: expected one tensor of topk_ids; dump it again")
    if tensor.dim() != 2 or str(tensor.dtype) not in _INTEGERS:
        raise MoEExtError(
            f"{path} has {tensor.dtype} {list(tensor.shape)}: expected integers [tokens, topk]; dump topk_ids"
        )
    return {str(path): tensor}


def _is_plain(tensor: object) -> bool:
    """True for a tensor whose numbers all lie in the file: a view that repeats them could be of any size."""
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_nested:
        return False
    return tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _parse_safetensors(path: Path, content: bytes) -> dict[str, torch.Tensor]:
    try:
        from safetensors import torch as safetensors
    except ImportError as error:
        raise MoEExtError(f"{path} takes the package safetensors to be read: install it") from error
    if int.from_bytes(content[:8], "little") > _MOST_HEADER_BYTES:
        raise MoEExtError(f"{path} names more tensors than a capture has layers: capture it again, or remove it")
    try:
        tensors = safetensors.load(content)
    except Exception as error:
        raise MoEExtError(f"{path} is damaged ({show(error)}); capture it again, or remove it") from error
    ids = {key: value for key, value in tensors.items() if value.dim() == 2 and str(value.dtype) in _INTEGERS}
    if not ids:
        raise MoEExtError(f"{path} has no integers [tokens, topk]: expected a tensor of topk_ids for each layer")
    return {f"{path} ({show(key, 60)})": value for key, value in ids.items()}


def _check_ids(tensor: torch.Tensor, name: str, shape: MoEShape) -> torch.Tensor:
    """Its rows, int32, with the fused shared experts added where the dump lacks them, and without padding."""
    import torch

    routed, fused = routed_experts(shape), shape.fused_shared
    taken = shape.top_k - fused
    if shape.zero_experts and not fused:
        tensor = _mask_zero_experts(tensor, routed, shape.zero_experts)
    if tensor.shape[1] not in (shape.top_k, taken):
        widths = " or ".join(map(str, sorted({shape.top_k, taken})))
        raise ModelError(f"{name} has {tensor.shape[1]} experts a token: expected {widths}; dump it from this model")
    ids = tensor.to(torch.int64)  # a comparison of bytes with -1 or 256 wraps
    ids = ids[(ids != REMOTE).any(dim=1)]  # a row of -1 alone pads a batch, or has no work for the kernel
    has_shared = fused > 0 and tensor.shape[1] == shape.top_k
    ordered = ids.sort(dim=1).values
    least = REMOTE if shape.zero_experts else 0
    impossible = (ordered < least) | (ordered >= routed + (fused if has_shared else 0))
    impossible[:, 1:] |= (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != REMOTE)
    if has_shared:
        impossible[:, -fused:] |= ordered[:, -fused:] < routed
    wrong = impossible.any(dim=1)
    if wrong.any():
        shared = f" and then the fused shared ones from {routed} on" if has_shared else ""
        raise ModelError(
            f"{name}: a token takes experts {ids[wrong][0].tolist()}; expected {taken} different ones of "
            f"0 ... {routed - 1}{shared}; dump it from this model, as the router gives it, of all ranks' experts"
            f"{_guess_why(ids[wrong][0].tolist(), routed)}"
        )
    ids = ids.to(torch.int32)
    if has_shared:
        return ids
    return torch.cat((ids, torch.arange(routed, routed + fused, dtype=torch.int32).expand(len(ids), -1)), dim=1)


def _mask_zero_experts(tensor: torch.Tensor, routed: int, zero_experts: int) -> torch.Tensor:
    """[rows, top_k] with -1 for the router's choices without weights, as zero_experts_compute of SGLang makes them."""
    import torch

    ids = tensor.to(torch.int64)
    return torch.where((ids >= routed) & (ids < routed + zero_experts), REMOTE, ids)


def _guess_why(row: list[int], routed: int) -> str:
    """What may have made such ids, as the end of a message."""
    if REMOTE in row:
        return " (-1 stands for experts of other ranks: a server with expert parallelism shows one rank's part alone)"
    if len(set(row)) == len(row) and routed <= max(row) < 2 * routed and min(row) >= 0:
        return " (or are they places of redundant experts? a server without --ep-num-redundant-experts has none)"
    return ""


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CapturedRouting:
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
        return weighted(for_rank(ids, shape, rank).to(device), generator)

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
def for_rank(ids: torch.Tensor, shape: MoEShape, rank: int) -> torch.Tensor:
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


def source(folder: Path, shape: MoEShape) -> RoutingSource:
    """The routing that a server of this layer dumped there; its name follows from the files' names and contents.

    Raises:
        ModelError: a file has ids that this layer cannot have.
        MoEExtError: there is no dump, or a file cannot be read as one.
    """
    import torch

    digest, tables = read(folder, shape)
    name = f"captured {digest}" + (f" as the busiest of {shape.ep} ranks sees it" if shape.ep > 1 else "")
    stored = io.BytesIO()
    torch.save(torch.cat(tables), stored)
    return RoutingSource(name, (CapturedRouting(name, tuple(map(len, tables)), stored.getvalue()),))
