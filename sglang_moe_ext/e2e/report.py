"""Servers side by side: the tables for people and for a pull request, and one document for programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sglang_moe_ext.e2e.measure import Cases, Kind, Sample, Turn, pool

PREFILL_COLUMNS = (
    "input length",
    "stock, requests/s",
    "stock, mean TTFT ms",
    "plugin, requests/s",
    "plugin, mean TTFT ms",
    "TTFT reduction",
    "stock against itself",
)
DECODE_COLUMNS = ("batch", "stock, tokens/s", "plugin, tokens/s", "gain", "stock against itself")
KINDS: tuple[Kind, ...] = ("stock", "plugin")
_NOTHING = "-"
_T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""For 1 to 10 degrees of freedom."""
_Of = Callable[[Turn], Sample | None]


@dataclass(frozen=True, slots=True)
class Compared:
    """Plugin over stock in one case. `change`: of the mean; `error`: half of its 95 % interval, by the spread alone,
    None where one of them was measured once.

    `drift`: by how much the means of the stock servers differ, where there are two.
    """

    stock: Sample
    plugin: Sample
    change: float
    error: float | None
    drift: float | None


def compare(turns: Sequence[Turn], of: _Of) -> Compared | None:
    """None where one of the two kinds has no figure."""
    of_stock = _samples(turns, "stock", of)
    stock, plugin = pool(of_stock), pool(_samples(turns, "plugin", of))
    if stock is None or plugin is None:
        return None
    ratio = plugin.mean / stock.mean
    means = [one.mean for one in of_stock]
    drift = (max(means) - min(means)) / stock.mean if len(means) > 1 else None
    return Compared(stock, plugin, ratio - 1, _error(ratio, stock, plugin), drift)


def _error(ratio: float, *samples: Sample) -> float | None:
    """Half of the 95 % interval of a ratio of two means, by Student's t with Welch's degrees of freedom."""
    if any(one.count < 2 for one in samples):
        return None
    variances = [one.deviation**2 / one.count / one.mean**2 for one in samples]
    total = sum(variances)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(it**2 / (one.count - 1) for it, one in zip(variances, samples, strict=True))
    return _t95(freedom) * ratio * math.sqrt(total)


def _t95(freedom: float) -> float:
    """Student's t of a two-sided 95 % interval; beyond the table to within half a percent."""
    whole = max(1, int(freedom))
    return _T95[whole - 1] if whole <= len(_T95) else 1.96 + 2.6 / whole


def _samples(turns: Sequence[Turn], kind: Kind, of: _Of) -> list[Sample]:
    found = (of(turn) for turn in turns if turn.kind == kind)
    return [one for one in found if one is not None]


def ttft_of(tokens: int) -> _Of:
    """The times to the first token of prompts of that length."""
    return lambda turn: None if tokens not in turn.first_tokens else turn.first_tokens[tokens].ttft_ms


def decode_of(batch: int) -> _Of:
    """The tokens a second of so many requests at once."""
    return lambda turn: turn.decode.get(batch)


def _requests_per_s(turns: Sequence[Turn], kind: Kind, tokens: int) -> float | None:
    """Of that kind, over all of its servers."""
    rates = [it.first_tokens[tokens].requests_per_s for it in turns if it.kind == kind and tokens in it.first_tokens]
    return sum(rates) / len(rates) if rates else None


def prefill_rows(turns: Sequence[Turn], cases: Cases) -> list[list[str]]:
    """As PREFILL_COLUMNS, a row for each input length."""
    rows = []
    for tokens in cases.input_lengths:
        found, cells = compare(turns, ttft_of(tokens)), []
        for kind in KINDS:
            cells += [
                _rate(_requests_per_s(turns, kind, tokens)),
                _spread(pool(_samples(turns, kind, ttft_of(tokens))), 1),
            ]
        rows.append([str(tokens), *cells, _change(found, sign=-1), _drift(found)])
    return rows


def decode_rows(turns: Sequence[Turn], cases: Cases) -> list[list[str]]:
    """As DECODE_COLUMNS, a row for each batch."""
    rows = []
    for batch in cases.batches:
        found = compare(turns, decode_of(batch))
        cells = [_spread(pool(_samples(turns, kind, decode_of(batch))), 0) for kind in KINDS]
        rows.append([str(batch), *cells, _change(found, sign=1), _drift(found)])
    return rows


def _rate(rate: float | None) -> str:
    return _NOTHING if rate is None else f"{rate:.2f}"


def _spread(found: Sample | None, places: int) -> str:
    if found is None:
        return _NOTHING
    spread = f" ± {found.deviation:.{places}f}" if found.count > 1 else ""
    return f"{found.mean:.{places}f}{spread}"


def _change(found: Compared | None, *, sign: int) -> str:
    if found is None:
        return _NOTHING
    error = "" if found.error is None else f" ± {100 * found.error:.1f}"
    return f"{100 * sign * found.change:+.1f}{error} %"


def _drift(found: Compared | None) -> str:
    return _NOTHING if found is None or found.drift is None else f"{100 * found.drift:.1f} %"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as a pull request has it."""
    lines = [columns, ["---:"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def remarks(turns: Sequence[Turn]) -> list[str]:
    """What is wrong with a server, and what its log said of tables and errors."""
    lines: list[str] = []
    for number, turn in enumerate(turns):
        name = f"server {number + 1} ({turn.kind})"
        lines += [f"{name}: WRONG: {turn.wrongly_attached}"] if turn.wrongly_attached else []
        lines += [f"{name}: failed: {turn.failure}"] if turn.failure else []
        lines += [] if turn.said is None else [f"{name}: {line}" for line in (*turn.said.tables, *turn.said.errors)]
    return lines


def document(turns: Sequence[Turn], cases: Cases) -> Mapping[str, Any]:
    """All figures for programs; `compared` is null where one of the two kinds has none."""
    return {
        "cases": asdict(cases),
        "servers": [
            {
                "server": turn.kind,
                "start_s": turn.start_s,
                "first_tokens": {str(tokens): asdict(found) for tokens, found in turn.first_tokens.items()},
                "tokens_per_s": {str(batch): asdict(found) for batch, found in turn.decode.items()},
                "plugin_active": None if turn.said is None else turn.said.is_active,
                "tables": [] if turn.said is None else list(turn.said.tables),
                "errors": [] if turn.said is None else list(turn.said.errors),
                "failure": turn.failure,
            }
            for turn in turns
        ],
        "compared": {
            "ttft": {str(tokens): _compared(compare(turns, ttft_of(tokens))) for tokens in cases.input_lengths},
            "tokens_per_s": {str(batch): _compared(compare(turns, decode_of(batch))) for batch in cases.batches},
        },
    }


def _compared(found: Compared | None) -> Mapping[str, Any] | None:
    if found is None:
        return None
    return {"plugin_over_stock": 1 + found.change, "error": found.error, "drift": found.drift}


def is_whole(found: Mapping[str, Any]) -> bool:
    """Whether every server was measured in full, and none is other than its name says."""
    return all(
        server["failure"] is None and server["plugin_active"] in (None, server["server"] == "plugin")
        for server in found["servers"]
    )
