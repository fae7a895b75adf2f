"""The text of a pull request that gives a table to SGLang or vLLM, in the form that its project asks for."""

from __future__ import annotations

import re

from sglang_moe_ext.engines.pull_request_form import FORMS
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.report.run_data import NOT_RECORDED, ReportedRun, TokensRow, mean_gain, tuned_gains
from sglang_moe_ext.tuning.search.statistics import Interval
from sglang_moe_ext.untrusted import show

_COLUMNS = ("M", "before, us", "after, us", "gain", "95 %", "relative error")
_MARKS = re.compile(r"([\\`*_{}\[\]<>|#~!])")


def write(run: ReportedRun) -> str:
    """The Markdown text; it ends with a line end. A run of an engine that is not known has none of an engine's form."""
    form = None if run.engine is None else FORMS[run.engine]
    if form is None:
        return f"The table of {escape(run.name)} does not say which engine it is for: no pull request can be written.\n"
    known = dict(run.environment)
    gpu = run.device_name.replace("_", " ")
    folder = form.folder.format(triton=(run.triton or "X.Y.Z").replace(".", "_"))
    title = form.title.format(model=escape(_model(run)), gpu=escape(gpu))
    engine = ENGINES[run.engine].TITLE if run.engine is not None else ""
    parts = [
        f"# {title}",
        f"## {form.motivation}",
        f"Kernel configurations for this MoE layer on this GPU. {_summary(run, engine)}",
        _list(
            ("layer", run.name if run.shape is None else str(run.shape)),
            ("GPU", gpu),
            ("measured with", known.get("kernel", NOT_RECORDED)),
            ("torch", known.get("torch", NOT_RECORDED)),
            ("driver", known.get("driver", NOT_RECORDED)),
            ("date", known.get("date", NOT_RECORDED)),
        ),
        f"## {form.changes}",
        "\n".join(f"- `{_code(f'{folder}/{name}')}`" for name in run.files) or f"Files: {NOT_RECORDED}.",
        f"## {form.accuracy}",
        _accuracy(run),
        "Commands:\n\n" + ("\n".join(f"    {_code(line)}" for line in run.commands) or f"    # {NOT_RECORDED}"),
        f"## {form.benchmark}",
        "Time of the whole MoE layer with a cold L2 cache, interleaved with what the engine ran before.",
        table(run),
    ]
    return "\n\n".join(parts) + "\n"


def _model(run: ReportedRun) -> str:
    return dict(run.environment).get("model", NOT_RECORDED) if run.kind == "table" else run.name


def _summary(run: ReportedRun, engine: str) -> str:
    unmeasured = [row.m for row in run.rows if row.origin != "measured"]
    warning = f" {len(unmeasured)} of {len(run.rows)} entries were NOT measured on this GPU." if unmeasured else ""
    gains = tuned_gains(run)
    if (mean := mean_gain(list(gains.values()))) is None:
        return f"What they gain is not recorded.{warning}"
    best = max(gains, key=gains.__getitem__)
    if gains[best] <= 1:
        return f"Nothing beat what {engine} ran there before: there is nothing to send.{warning}"
    return (
        f"Against what {engine} ran there before they gain {mean:.2f}x (geometric mean of {len(gains)} batch sizes), "
        f"{gains[best]:.2f}x at M={best}.{warning}"
    )


def _accuracy(run: ReportedRun) -> str:
    errors = [row.error for row in run.rows if row.error is not None]
    if not errors:
        return f"Relative error against float32: {NOT_RECORDED}."
    bound = "" if run.tolerated_error is None else f"; tolerated are {run.tolerated_error:.1e}"
    return f"Relative error of the layer against a float32 reference: {max(errors):.1e} at most{bound}."


def table(run: ReportedRun) -> str:
    """A gain for each M, as a Markdown table."""
    lines = [list(_COLUMNS), ["---:"] * len(_COLUMNS), *map(_cells, run.rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: TokensRow) -> list[str]:
    error = "-" if row.error is None else f"{row.error:.1e}"
    return [str(row.m), _us(row.stock_us), _us(row.tuned_us), *_gain(row.gain), error]


def _us(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}"


def _gain(gain: Interval | None) -> tuple[str, str]:
    return ("-", "-") if gain is None else (f"{gain.value:.2f}x", f"{gain.low:.2f} to {gain.high:.2f}")


def _list(*items: tuple[str, str]) -> str:
    return "\n".join(f"- {name}: {escape(value)}" for name, value in items)


def escape(text: str) -> str:
    """A stranger's text on one line, with no meaning in Markdown or HTML; a mention or a link becomes plain text."""
    return _MARKS.sub(r"\\\1", show(text).replace("&", "&amp;")).replace("@", "@\u200b").replace("://", ":\u200b//")


def _code(text: str) -> str:
    return show(text, 1000).replace("`", "'")
