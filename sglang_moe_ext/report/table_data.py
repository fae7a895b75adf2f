"""Read a table with its provenance, and the plans of our kernels beside it, into a report's values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from sglang_moe_ext.core import Gpu, GpuError, MoEShape, TableError
from sglang_moe_ext.few_tokens_config import FewTokensConfig
from sglang_moe_ext.gpu.roofline import pair_floor_us
from sglang_moe_ext.report.run_data import NOT_RECORDED, KernelsRow, ReportedRun, TokensRow
from sglang_moe_ext.schemes import find_row
from sglang_moe_ext.stock import given_table
from sglang_moe_ext.stock.given_table import GivenTable
from sglang_moe_ext.tables import config_table, plan_table, provenance
from sglang_moe_ext.tables.plan_table import KernelEntry
from sglang_moe_ext.tables.provenance import TuningRun
from sglang_moe_ext.tuning.search.statistics import Interval
from sglang_moe_ext.untrusted import show

_MOST_ENTRIES, _MOST_RUNS = 512, 8
_ALWAYS = tuple(item.name for item in fields(TuningRun))


def read(path: Path) -> ReportedRun:
    """What is known of that table.

    Raises:
        TableError: it is no table, or is one of the down projection, or what lies beside it is broken.
    """
    where = show(str(path))
    given = given_table.read(path)
    if given.key.down:
        raise TableError(f"{where} is the table of the down projection: name the one without _down, it reads both")
    if given.known is not None and given.known.broken is not None:
        raise TableError(given.known.broken)
    if len(given.table) > _MOST_ENTRIES:
        raise TableError(f"{where} has {len(given.table)} entries: expected no more than {_MOST_ENTRIES}")
    notes: list[str] = []
    shape, gpu = given_table.stated_shape(given), _gpu(given, notes)
    if given.known is None:
        notes.append("no provenance beside this table: it is not recorded how its entries came to be")
    runs = _runs(given)
    notes.append("a table does not record the candidates of the search: no map of the search space and no regret")
    if len(runs) > 1:
        notes.append(f"its entries come from {len(runs)} runs: the environment is that of the first entry")
    return ReportedRun(
        kind="table",
        source=where,
        name=show(runs[0].model) if runs else show(path.stem),
        engine=given.engine,
        triton=given.triton if given.triton is None else show(given.triton),
        shape=shape,
        gpu=gpu,
        device_name=show(given.key.device_name).replace("_", " "),
        environment=_environment(runs),
        commands=tuple(dict.fromkeys(show(run.command, 1000) for run in runs[:_MOST_RUNS])),
        rows=_rows(path, given, shape, gpu),
        tolerated_error=None if shape is None else find_row(shape.quantization.scheme).tolerated_error,
        files=_files(path),
        notes=tuple(notes),
    )


def _gpu(given: GivenTable, notes: list[str]) -> Gpu | None:
    try:
        return given.gpu
    except GpuError as error:
        notes.append(f"no roofline but where the provenance has it: {show(error)}")
        return None


def _runs(given: GivenTable) -> list[TuningRun]:
    entries = {} if given.known is None else given.known.entries
    return list(dict.fromkeys(entries[m].run for m in sorted(entries)))


def _environment(runs: list[TuningRun]) -> tuple[tuple[str, str], ...]:
    if not runs:
        return tuple((name, NOT_RECORDED) for name in _ALWAYS)
    stated = {name: getattr(runs[0], name) for name in _ALWAYS}
    return tuple((name, NOT_RECORDED if value is None else show(value, 1000)) for name, value in stated.items())


def _down_beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}_down{path.suffix}")


def _files(path: Path) -> tuple[str, ...]:
    down = _down_beside(path)
    return (path.name, down.name) if down.is_file() else (path.name,)


def _rows(path: Path, given: GivenTable, shape: MoEShape | None, gpu: Gpu | None) -> tuple[TokensRow, ...]:
    down_path = _down_beside(path)
    down = config_table.read(down_path) if down_path.is_file() else given.table
    ours = plan_table.read(plan_table.path_beside(path))
    known = provenance.Provenance({}) if given.known is None else given.known
    rows: list[TokensRow] = []
    for m in sorted({*given.table, *(m for m, entry in ours.items() if entry.figures)}):
        figures = known.entries[m].figures if m in known.entries else {}
        read_figure = _Figures(show(str(path)), m, figures)
        rows.append(
            TokensRow(
                m=m,
                origin=known.origin(m),
                up=str(given.table[m]) if m in given.table else None,
                down=str(down[m]) if m in down else None,
                stock_us=read_figure("incumbent_us"),
                tuned_us=read_figure("us"),
                predicted_us=read_figure("predicted_us"),
                floor_us=_floor(read_figure("floor_us"), shape, gpu, m),
                gain=read_figure.interval(),
                noise=read_figure("noise", least=0.0),
                error=read_figure("relative_error", least=0.0),
                clock_mhz=read_figure("sm_clock_mhz"),
                kernels=_kernels_row(path, m, ours.get(m)),
            )
        )
    return tuple(rows)


def _floor(stated: float | None, shape: MoEShape | None, gpu: Gpu | None, m: int) -> float | None:
    return pair_floor_us(shape, gpu, m) if stated is None and shape is not None and gpu is not None else stated


def _kernels_row(path: Path, m: int, entry: KernelEntry | None) -> KernelsRow | None:
    if entry is None:
        return None
    if entry.plan is None:
        return KernelsRow(None if entry.of_later is None else "a plan that only a later version knows")
    read_figure = _Figures(show(str(plan_table.path_beside(path))), m, entry.figures)
    return KernelsRow(
        plan=str(entry.plan),
        us=read_figure("us"),
        engine_us=read_figure("incumbent_us"),
        gain=read_figure.interval(),
        error=read_figure("relative_error", least=0.0),
        in_graph=isinstance(entry.plan, FewTokensConfig),
    )


class _Figures:
    """The figures of one entry, which a stranger may have written."""

    def __init__(self, where: str, m: int, figures: Mapping[str, float]) -> None:
        self._where, self._m, self._figures = where, m, figures

    def __call__(self, name: str, least: float = 1e-9) -> float | None:
        """The figure, None where it is not recorded.

        Raises:
            TableError: it is no positive number.
        """
        figure = self._figures.get(name)
        if figure is None:
            return None
        if not least <= figure < math.inf:
            raise TableError(f"{self._where}: the figure {name} at M={self._m} is {figure}: expected a positive number")
        return figure

    def interval(self) -> Interval | None:
        """The gain with its bounds; a missing bound is the gain itself."""
        value = self("gain")
        if value is None:
            return None
        low, high = self("gain_low"), self("gain_high")
        return Interval(value, min(value, low or value), max(value, high or value))


def is_table(path: Path) -> bool:
    """Whether the path is named as a table is."""
    return path.suffix == ".json"
