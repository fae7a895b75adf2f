"""Read the topk_ids that a server dumped into a folder; files are untrusted, and each is refused by its name."""

from __future__ import annotations

import hashlib
import io
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_moe_ext.core import ModelError, MoEExtError, MoEShape
from sglang_moe_ext.tuning.routing import REMOTE, routed_experts

if TYPE_CHECKING:
    import torch

# As upstream's benchmark/kernels/fused_moe_triton/README.md has a server name its dumps.
_UPSTREAMS = re.compile(r"topk_ids_layer\d+_idx\d+\.pt")
_OURS = ".safetensors"
_EXPECTED = f"files topk_ids_layer<L>_idx<I>.pt or *{_OURS}"
_INTEGERS = ("torch.uint8", "torch.int16", "torch.int32", "torch.int64")
_MOST_BYTES = 1 << 30
"""Of one file; 8 ids of 4 bytes for 32,768 tokens in each of 60 layers are 63 MB."""
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
    paths = _dumps(folder)
    for path in random.Random(0).sample(paths, len(paths)):  # early files alone would be early requests alone
        content = _content(path)
        digests[path.name] = hashlib.sha256(content).hexdigest()
        if sum(map(len, tables)) < _ENOUGH_ROWS:
            named = _ours(path, content) if path.suffix == _OURS else _upstreams(path, content)
            tables += [_ids(tensor, name, shape) for name, tensor in named.items()]
    tables = [table for table in tables if len(table)]
    if not tables:
        raise MoEExtError(f"{folder}: its dumps have no tokens; dump topk_ids again while the server has requests")
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:12], tables


def _dumps(folder: Path) -> list[Path]:
    try:
        paths = [path for path in folder.iterdir() if path.suffix == _OURS or _UPSTREAMS.fullmatch(path.name)]
        found = sorted(path for path in paths if path.is_file())
    except OSError as error:
        raise MoEExtError(f"cannot read {folder}: {error.strerror}; --topk-ids-dir takes a folder") from error
    if not found:
        raise MoEExtError(f"{folder} has no captured topk_ids: expected {_EXPECTED}")
    return found


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise MoEExtError(f"{path} is larger than {_MOST_BYTES >> 30} GiB: expected topk_ids alone; remove it")
        return path.read_bytes()
    except OSError as error:
        raise MoEExtError(f"cannot read {path}: {error.strerror}") from error


def _upstreams(path: Path, content: bytes) -> dict[str, torch.Tensor]:
    import torch

    try:
        tensor = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
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


def _ours(path: Path, content: bytes) -> dict[str, torch.Tensor]:
    try:
        from safetensors import torch as safetensors
    except ImportError as error:
        raise MoEExtError(f"{path} takes the package safetensors to be read: install it") from error
    try:
        tensors = safetensors.load(content)
    except Exception as error:
        raise MoEExtError(f"{path} is damaged ({error}); capture it again, or remove it") from error
    ids = {key: value for key, value in tensors.items() if value.dim() == 2 and str(value.dtype) in _INTEGERS}
    if not ids:
        raise MoEExtError(f"{path} has no integers [tokens, topk]: expected a tensor of topk_ids for each layer")
    return {f"{path} ({key})": value for key, value in ids.items()}


def _ids(tensor: torch.Tensor, name: str, shape: MoEShape) -> torch.Tensor:
    """Its rows, int32, with the fused shared experts added where the dump lacks them, and without padding."""
    import torch

    routed, fused = routed_experts(shape), shape.fused_shared
    taken = shape.top_k - fused
    if tensor.shape[1] not in (shape.top_k, taken):
        widths = " or ".join(map(str, sorted({shape.top_k, taken})))
        raise ModelError(f"{name} has {tensor.shape[1]} experts a token: expected {widths}; dump it from this model")
    ids = tensor.to(torch.int64)  # a comparison of bytes with -1 or 256 wraps
    ids = ids[(ids != REMOTE).any(dim=1)]  # a row of -1 alone pads a batch
    has_shared = fused > 0 and tensor.shape[1] == shape.top_k
    ordered = ids.sort(dim=1).values
    impossible = (ordered < 0) | (ordered >= routed + (fused if has_shared else 0))
    impossible[:, 1:] |= ordered[:, 1:] == ordered[:, :-1]
    if has_shared:
        impossible[:, -fused:] |= ordered[:, -fused:] < routed
    wrong = impossible.any(dim=1)
    if wrong.any():
        shared = f" and then the fused shared ones from {routed} on" if has_shared else ""
        raise ModelError(
            f"{name}: a token takes experts {ids[wrong][0].tolist()}; expected {taken} different ones of "
            f"0 ... {routed - 1}{shared}; dump it from this model, as the router gives it, of all ranks' experts"
        )
    ids = ids.to(torch.int32)
    if has_shared:
        return ids
    return torch.cat((ids, torch.arange(routed, routed + fused, dtype=torch.int32).expand(len(ids), -1)), dim=1)
