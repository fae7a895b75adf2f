"""What a tuning run of `kernels.grouped_gemm` leaves: the table with its provenance, and the document for programs."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from sglang_moe_ext import __version__
from sglang_moe_ext.gpu.roofline import gemm_floor
from sglang_moe_ext.tables import config_table, files, grouped_gemm_table, provenance, user_store
from sglang_moe_ext.tables.provenance import Provenance, ProvenanceEntry, TuningRun
from sglang_moe_ext.tuning.bench.messages import Pair
from sglang_moe_ext.tuning.compile.kernel_source import grouped_gemm_source
from sglang_moe_ext.tuning.grouped_gemm import GroupedGemmRequest
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice
from sglang_moe_ext.tuning.versions import driver_version, version_of


def write(request: GroupedGemmRequest, found: Mapping[int, MeasuredChoice[Pair]]) -> tuple[Path, ...]:
    """Write the table and its provenance; entries of other numbers of rows that lie there stay.

    Raises:
        MoEExtError: a folder cannot be written, or what lies there is no table.
    """
    triton = version_of("triton") or ""
    folders = [grouped_gemm_table.folder(user_store.root(), request.gpu.device_name, triton)]
    folders += [] if request.output_dir is None else [request.output_dir]
    contents: dict[Path, str] = {}
    for folder in folders:
        path = folder / request.key.file_name
        before = config_table.read(path) if path.exists() else {}
        known = provenance.read(path) if path.exists() else None
        contents[path] = config_table.to_json(before | {rows: choice.pair["up"] for rows, choice in found.items()})
        entries = {} if known is None else known.entries
        contents[provenance.sidecar(path)] = provenance.to_json(Provenance(entries | _entries(request, found)))
    files.write_together(contents)
    grouped_gemm_table.forget()
    return tuple(path for path in contents if config_table.is_table(path.name))


def _entries(request: GroupedGemmRequest, found: Mapping[int, MeasuredChoice[Pair]]) -> dict[int, ProvenanceEntry]:
    run = TuningRun(
        date=f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        command=request.command,
        model=request.name,
        shape=str(request.shape),
        gpu=request.gpu.device_name,
        kernel=grouped_gemm_source().name,
        engine=None,
        triton=version_of("triton"),
        torch=version_of("torch"),
        driver=driver_version(),
        seed=request.seed,
        sglang_moe_ext=__version__,
    )
    return {
        rows: ProvenanceEntry(
            "measured", run, {"us": choice.us, "today_us": choice.incumbent_us, "error": choice.error}
        )
        for rows, choice in found.items()
    }


def _floor_us(request: GroupedGemmRequest, rows: int) -> float | None:
    """None of float32, whose rate the table of GPUs does not have."""
    if request.shape.dtype == "float32":
        return None
    return round(gemm_floor(request.shape, request.gpu, rows, "up").us, 2)


def document(
    request: GroupedGemmRequest, found: Mapping[int, MeasuredChoice[Pair]], written: Sequence[Path]
) -> dict[str, object]:
    """For programs."""
    return {
        "kernel": "grouped_gemm",
        "shape": str(request.shape),
        "gpu": request.gpu.device_name,
        "triton": version_of("triton"),
        "file": request.key.file_name,
        "rows": {
            str(rows): {
                "config": asdict(choice.pair["up"]),
                "us": round(choice.us, 2),
                "today": asdict(choice.incumbent["up"]),
                "today_us": round(choice.incumbent_us, 2),
                "gain": [round(value, 4) for value in (choice.gain.low, choice.gain.value, choice.gain.high)],
                "floor_us": _floor_us(request, rows),
                "error": choice.error,
            }
            for rows, choice in found.items()
        },
        "written": [str(path) for path in written],
    }
