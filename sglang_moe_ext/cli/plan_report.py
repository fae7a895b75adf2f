"""What is printed before a tuning run: its candidates, its forecast, what runs today, and what it could win."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_moe_ext.cli import console, output
from sglang_moe_ext.cli.console import Grid
from sglang_moe_ext.engines.lookup_probe import LookupResult
from sglang_moe_ext.tuning import incumbent_source, worth_verdict
from sglang_moe_ext.tuning.request import TuneRequest
from sglang_moe_ext.tuning.tune_plan import TunePlan
from sglang_moe_ext.tuning.worth import TuningGain, Worth, WorthRow

_NOTHING = "-"


def say_plan(request: TuneRequest, plan: TunePlan) -> None:
    """What the run will do, and what it could gain by the model."""
    gpu = request.gpu
    where = "here" if request.gpu_is_here else "not here"
    print(f"{request.model}: {request.shape}")
    print(f"{gpu.device_name} ({where}): {gpu.target}, {gpu.smem_per_block} B of shared memory a block, {gpu.source}")
    for engine, name in output.names_of(request).items():
        print(f"  {engine}: {name}")
    console.show(output.candidates(plan))
    console.show(output.forecast(plan))
    say_today(request, plan.today)
    doing = "measure" if plan.measures else "predict"
    sizes = f"{len(plan.rows)} batch size{'s' if len(plan.rows) > 1 else ''}"
    print(f"will {doing} {sizes} with {plan.binaries} binaries, in about {plan.estimated_s:.0f} s")


def say_today(request: TuneRequest, answer: LookupResult | None) -> None:
    """Whose configurations `today` means."""
    if answer is None:
        print(f"today: unknown, since {request.adapter.TITLE} is not installed here to be asked")
        return
    for line in incumbent_source.describe(incumbent_source.sources(request, answer)):
        print(line)
    if answer.backend is not None:
        why = request.adapter.why_no_table(request.shape, request.gpu, request.architecture, answer.backend)
        found = f"it runs {answer.backend.name} ({answer.backend.method}), which reads tables"
        print(f"note: {why}" if why else f"{request.adapter.TITLE} {answer.engine_version} was asked: {found}")
    if answer.is_from_files:
        print(
            f"today is what {request.adapter.TITLE} {answer.engine_version}'s own lookup answers, run from its files "
            "without the rest of the engine, which was not asked; --ask asks it"
        )


def say_worth(request: TuneRequest, plan: TunePlan, worth: Worth) -> None:
    """What the run could win at each M, what that rests on, and the answer in plain sentences last."""
    console.show(_worth_grid(request, worth))
    if worth.is_asked:
        say_today(request, plan.today)
    elif plan.today is not None:
        print(f"today is a guess, since {request.adapter.TITLE} is not installed here to be asked")
    else:
        say_today(request, None)
    for line in _bases(request, worth):
        print(line)
    for sentence in worth_verdict.sentences(worth):
        print(sentence)


def _worth_grid(request: TuneRequest, worth: Worth) -> Grid:
    rows = [
        [
            str(row.tokens),
            "prefill" if row.is_prefill else "decode",
            _NOTHING if row.today_us is None else f"{row.today_us:.1f}",
            _NOTHING if row.today_us is None else f"{row.floor_us / row.today_us:.0%}",
            tuning_cell(row.tuning),
            _kernels_cell(row),
            _NOTHING if row.moe_share is None else f"{row.moe_share:.0%}",
            _range(row.saved_by_tuning()),
            _NOTHING if (saved := row.saved_by_kernels()) is None else f"{saved:.0%}",
        ]
        for row in worth.rows
    ]
    columns = ["M", "phase", "today us", "roof", "tuning", "our kernels", "MoE", "of pass", "kernels of pass"]
    title = f"worth of tuning {request.model} on {request.gpu.device_name}"
    title += "\ntoday us: up and down GEMM of one layer, predicted; roof: how much of the GEMM roofline that is"
    title += (
        "\ntuning, our kernels: gain of the layer; MoE: share of a forward pass, at most; of pass: what is saved of it"
    )
    return Grid(title, columns, rows, frozenset({"phase", "tuning", "our kernels"}))


def tuning_cell(gain: TuningGain) -> str:
    """The gain of a layer by tuning, with what it is known from."""
    match gain.basis:
        case "unknown":
            return "unknown"
        case "tuned already":
            return "tuned already"
        case "measured now":
            return f"{gain.low:.2f}x to {gain.high:.2f}x measured" if gain.low > 1 else "none measured"
        case "predicted":
            return (
                f"{gain.low:.2f}x to {gain.high:.2f}x" if gain.low > 1 else f"{gain.predicted:.2f}x, within the error"
            )


def _kernels_cell(row: WorthRow) -> str:
    if row.kernels is None:
        return _NOTHING
    runs = ", in use" if row.kernels_run else ""
    return f"{row.kernels.value:.2f}x at {row.kernels.tokens}{runs}" if row.kernels.value > 1 else "slower"


def _range(saved: tuple[float, float] | None) -> str:
    if saved is None:
        return _NOTHING
    least, most = (f"{share:.0%}" for share in saved)
    return least if least == most else f"{least} to {most}"


def _bases(request: TuneRequest, worth: Worth) -> list[str]:
    """What the columns rest on, as far as they have something."""
    lines = []
    if request.surroundings is None:
        lines.append("MoE: unknown: the model's attention is not stated, or of a kind that is not estimated")
    else:
        lines.append(
            "MoE: the experts' GEMMs as predicted, all else at the roofline (projections, attention, dense and shared "
            "MLPs; no communication, norms, head), so that the share and what is saved are the most that they can be"
        )
    sources = dict.fromkeys(row.kernels.source for row in worth.rows if row.kernels is not None)
    lines += [f"our kernels: measured against the tuned engine's kernel: {source}" for source in sources]
    if not sources:
        lines.append("our kernels: no measurement on this GPU for this layer is known")
    if any(row.tuning.basis == "predicted" for row in worth.rows):
        errors = dict.fromkeys(f"{row.tuning.error:.2f}x" for row in worth.rows)
        lines.append(
            f"tuning: a predicted gain was up to {' and '.join(errors)} too large where it was checked, on one GPU and "
            "one layer (docs/benchmarks/prediction.md); below that it is within the error"
        )
    return lines


def worth_document(worth: Worth) -> Mapping[str, Any]:
    """The estimate for programs; shares and what is saved are fractions of a forward pass, at most."""
    return {
        "asked": worth.is_asked,
        "verdict": list(worth_verdict.sentences(worth)),
        "rows": [_row_document(row) for row in worth.rows],
    }


def _row_document(row: WorthRow) -> Mapping[str, Any]:
    gain, kernels, source = row.tuning, row.kernels, row.source
    by_tuning = row.saved_by_tuning()
    return {
        "m": row.tokens,
        "phase": "prefill" if row.is_prefill else "decode",
        "floor_us": _rounded(row.floor_us, 2),
        "today_us": _rounded(row.today_us, 2),
        "today": None if source is None else {"source": source.text, "origin": source.origin, "gain": source.gain},
        "tuning": {
            "basis": gain.basis,
            "low": _rounded(gain.low, 4),
            "high": _rounded(gain.high, 4),
            "predicted": _rounded(gain.predicted, 4),
            "error": _rounded(gain.error, 4),
        },
        "kernels": None
        if kernels is None
        else {
            "m": kernels.tokens,
            "gain": _rounded(kernels.value, 4),
            "low": _rounded(kernels.low, 4),
            "high": _rounded(kernels.high, 4),
            "in_use": row.kernels_run,
            "source": kernels.source,
        },
        "moe_share": _rounded(row.moe_share, 4),
        "saved_by_tuning": None if by_tuning is None else [round(share, 4) for share in by_tuning],
        "saved_by_kernels": _rounded(row.saved_by_kernels(), 4),
    }


def _rounded(value: float | None, places: int) -> float | None:
    return None if value is None else round(value, places)
