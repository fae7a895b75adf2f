"""Where our own kernels are faster: `<table>.paths.json` beside a table, which no engine reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from sglang_moe_ext.core import TableError, TileConfig
from sglang_moe_ext.few_tokens_config import DownTile, FewTokensConfig, UpTile, has_known_sizes
from sglang_moe_ext.kernel_plans import (
    Down,
    DownConfig,
    DownForm,
    KernelPlan,
    Plan,
    ShortKDownConfig,
    Up,
    UpConfig,
    WarpSpecializedDown,
    WarpSpecializedUp,
)
from sglang_moe_ext.tables import files, provenance, user_store
from sglang_moe_ext.tables.config_table import ROCM_OPTIONS
from sglang_moe_ext.tables.provenance import TuningRun
from sglang_moe_ext.untrusted import show

FORMAT = 1
"""Of the file, and of our kernels: where one comes to do something else, nothing measured before may choose it."""
SUFFIX = ".paths.json"
_UP: dict[str, type[Up]] = {
    "engine": TileConfig,
    "sorted_up": UpConfig,
    "warp_specialized_up": WarpSpecializedUp,
}
_DOWN: dict[str, type[Down]] = {
    "sorted_down": DownConfig,
    "short_down": ShortKDownConfig,
    "warp_specialized_down": WarpSpecializedDown,
}
_FEW_UP, _FEW_DOWN = "few_tokens_up", "few_tokens_down"
_LARGEST = {"num_warps": 32, "num_stages": 16, "programs_per_sm": 8, "group_m": 4096, "tiles_per_program": 4096}
_LARGEST_SIDE = 256
_POWERS_OF_TWO = ("block_m", "block_n", "block_k", "num_warps")
_CHOICES: dict[str, tuple[object, ...]] = {"form": get_args(DownForm), "stages": WarpSpecializedUp.STAGES}
_KERNEL_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TOKENS = re.compile(r"[1-9][0-9]{0,18}")


@dataclass(frozen=True, slots=True)
class KernelEntry:
    """What was measured at one M. No plan: the engine's own kernels were as fast, or none of ours was right.

    `of_later`: a plan with a kernel that only a later version of this package has, as its JSON text; it is kept in the
    file, and the engine's own kernels run there.
    """

    plan: Plan | None
    run: TuningRun
    figures: dict[str, float] = field(default_factory=dict)
    of_later: str | None = None


KernelTable = dict[int, KernelEntry]


def path_beside(table: Path) -> Path:
    """The file of the kernel plans of the layer that a table is for."""
    return table.with_name(f"{table.stem}{SUFFIX}")


def document_of(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it: always an up and a down, of kernels that an older version may not know."""
    if isinstance(plan, FewTokensConfig):
        whole = {"grouped": plan.grouped, "wide_range": plan.wide_range}
        return {
            "up": {"kernel": _FEW_UP, **asdict(plan.up), **whole},
            "down": {"kernel": _FEW_DOWN, **asdict(plan.down)},
        }
    return {"up": _with_kernel(plan.up, _UP), "down": _with_kernel(plan.down, _DOWN)}


def _with_kernel(config: Up | Down, kernels: Mapping[str, type[Any]]) -> dict[str, Any]:
    name = next(name for name, kind in kernels.items() if isinstance(config, kind))
    return {"kernel": name, **{field: value for field, value in asdict(config).items() if field not in ROCM_OPTIONS}}


def parse_plan(document: Any) -> Plan:
    """Raises TableError where the document is no kernel plan, UnknownKernelError where a later version may know it."""
    match document:
        case {
            "up": {"kernel": "few_tokens_up"} as few_up,
            "down": {"kernel": "few_tokens_down"} as few_down,
            **rest,
        } if not rest:
            return _few_tokens(_without_kernel(few_up), _without_kernel(few_down))
        case {"up": up, "down": down, **rest} if not rest:
            plan = KernelPlan(_config(up, _UP), _config(down, _DOWN))
            if plan.block_m % plan.down.block_m == 0:
                return plan
            raise TableError(f"a down tile of {plan.down.block_m} rows in blocks of {plan.block_m}: expected a divisor")
    raise TableError(f"expected a kernel plan with up and down, found {show(document, 80)}")


def _without_kernel(document: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != "kernel"}


def _few_tokens(up: dict[str, Any], down: dict[str, Any]) -> FewTokensConfig:
    whole = {name: up.pop(name) for name in ("grouped", "wide_range") if name in up}
    for kind, values in ((UpTile, up), (DownTile, down)):
        names = {item.name for item in fields(kind)}
        if names < values.keys():
            raise UnknownKernelError(f"a tile for few tokens with {show(', '.join(sorted(values.keys() - names)))}")
        if values.keys() != names or not all(type(value) is int for value in values.values()):
            raise TableError(f"a tile for few tokens: expected whole numbers {', '.join(sorted(names))}")
    if len(whole) != 2 or not all(type(value) is bool for value in whole.values()):
        raise TableError("a plan for few tokens: expected grouped and wide_range, true or false")
    plan = FewTokensConfig(UpTile(**up), DownTile(**down), **whole)
    if not has_known_sizes(plan):
        raise TableError(f"{plan}: a side of a tile, its warps, stages or parts are none of those that were tried")
    return plan


class UnknownKernelError(TableError):
    """A kernel plan is well-formed and names a kernel that this version does not have."""


def _config(document: Any, kernels: Mapping[str, type[Any]]) -> Any:
    name = document.get("kernel") if isinstance(document, dict) else None
    kind = kernels.get(str(name))
    if kind is None:
        is_name = isinstance(name, str) and _KERNEL_NAME.fullmatch(name)
        error = UnknownKernelError if is_name else TableError
        raise error(f"expected a kernel of {', '.join(kernels)}, found {show(document, 80)}")
    values = _without_kernel(document)
    known = [item for item in fields(kind) if item.name not in ROCM_OPTIONS]  # our kernels run on NVIDIA GPUs alone
    names = {item.name for item in known}
    if values.keys() != names:
        error = UnknownKernelError if names < values.keys() else TableError  # a later version may know more of it
        raise error(f"a configuration of {document['kernel']} with {show(', '.join(sorted(values)))}: not its fields")
    for item in known:
        _check(item.name, values[item.name], is_flag=item.type == "bool")
    if values.get("use_tma"):
        raise TableError("an up GEMM of the engine with use_tma: our kernels take it without")
    return kind(**values)


def _check(name: str, value: object, *, is_flag: bool) -> None:
    if name in _CHOICES:
        if type(value) not in (int, str) or value not in _CHOICES[name]:
            raise TableError(f"{name}={show(value)}: expected one of {', '.join(map(str, _CHOICES[name]))}")
        return
    largest = _LARGEST.get(name, _LARGEST_SIDE)
    if type(value) is not (bool if is_flag else int) or not (is_flag or 1 <= value <= largest):
        raise TableError(f"{name}={show(value)}: expected {'true or false' if is_flag else f'1 to {largest}'}")
    if name in _POWERS_OF_TWO and value & (value - 1):
        raise TableError(f"{name}={value}: expected a power of two")


def to_json(table: KernelTable) -> str:
    """The file's text."""
    runs = list(dict.fromkeys(entry.run for entry in table.values()))
    document = {
        "format": FORMAT,
        "runs": [asdict(run) for run in runs],
        "entries": {
            str(m): {
                "path": json.loads(entry.of_later) if entry.of_later else entry.plan and document_of(entry.plan),
                "run": runs.index(entry.run),
                "figures": entry.figures,
            }
            for m, entry in sorted(table.items())
        },
    }
    return json.dumps(document, indent=1) + "\n"


def parse(document: Any) -> KernelTable:
    """Raises TableError where the document is no table of kernel plans of this format."""
    try:
        if document["format"] != FORMAT:
            raise TableError(f"a table of kernel plans of format {show(document['format'])}: expected {FORMAT}")
        runs = [provenance.parse_run(run) for run in document["runs"]]
        return {
            _tokens(m): _entry(entry, dict(enumerate(runs))[entry["run"]]) for m, entry in document["entries"].items()
        }
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TableError(f"no table of kernel plans: {type(error).__name__} {show(error)}") from error


def _entry(document: Any, run: TuningRun) -> KernelEntry:
    plan, figures = document["path"], {name: float(figure) for name, figure in document["figures"].items()}
    if plan is None:
        return KernelEntry(None, run, figures)
    try:
        return KernelEntry(parse_plan(plan), run, figures)
    except UnknownKernelError:
        return KernelEntry(None, run, figures, json.dumps(plan))


def _tokens(text: str) -> int:
    if not _TOKENS.fullmatch(text):
        raise TableError(f"key {show(text)!r}: expected a number of tokens such as 4096")
    return int(text)


def read(path: Path) -> KernelTable:
    """What lies there; nothing where there is no file.

    Raises:
        TableError: it cannot be read, or is no table of kernel plans.
    """
    if not os.path.lexists(path):
        return {}
    document = files.read_json(path)
    try:
        return parse(document)
    except TableError as error:
        raise TableError(f"{show(str(path))}: {error}") from error


def put(path: Path, table: KernelTable) -> None:
    """Write the entries; those of other numbers of tokens that lie there already stay.

    Raises:
        MoEExtError: what lies there is no table of kernel plans, or the disk refuses.
    """
    with user_store.locked([path.parent]):
        files.remove_leftovers(path.parent)
        files.write_together({path: to_json(read(path) | table)})
