"""Say in plain sentences whether tuning a layer is worth its time."""

from __future__ import annotations

from sglang_moe_ext.tuning.worth import Worth, WorthRow

PREFILL_TOKENS, DECODE_TOKENS = 4096, 64
"""The numbers of tokens that the sentences are about, or those nearest to them that were asked for."""
_LEAST = 0.005
"""Shares below this are nothing to speak of."""


def sentences(worth: Worth) -> tuple[str, ...]:
    """One sentence on prefill, one on decode and one on our own kernels, as far as there is something to say."""
    prefill = worth.near(PREFILL_TOKENS, is_prefill=True)
    decode = worth.near(DECODE_TOKENS, is_prefill=False)
    phases = [_tuning(worth, row) for row in (prefill, decode) if row is not None]
    kernels = [_kernels(worth, row) for row in (prefill, decode) if row is not None]
    return (*phases, *(sentence for sentence in kernels if sentence is not None))


def _phase(row: WorthRow) -> str:
    return f"prefill at {row.tokens:,} tokens" if row.is_prefill else f"decode at a batch of {row.tokens:,}"


def _tuning(worth: Worth, row: WorthRow) -> str:
    gain, phase = row.tuning, _phase(row)
    if gain.basis == "unknown":
        return f"What tuning can win of {phase} is not known: {worth.engine} is not installed here to be asked."
    because = _because(worth, row)
    if gain.basis == "tuned already":
        return f"Tuning wins nothing to count on of {phase}: {because}."
    if gain.basis == "measured now":
        if gain.low <= 1:
            return f"In a first measurement the model's best candidate won nothing of {phase}: {because}."
        return f"Tuning can win {_at_most(row, gain.low, gain.low)} of {phase}, as measured just now: {because}."
    if gain.low <= 1:
        return (
            f"Tuning wins nothing that is certain of {phase}: the {gain.predicted:.2f}x that the model predicts for "
            f"the layer is within its error, up to {gain.error:.2f}x; {because}."
        )
    return f"Tuning can win {_at_most(row, gain.low, gain.high)} of {phase}, by the model: {because}."


def _because(worth: Worth, row: WorthRow) -> str:
    source = row.source
    if source is None:
        return "the engine was not asked what runs today"
    if not source.is_ours:
        if source.text == f"{worth.engine}'s default":
            return f"{worth.engine} has no table for this layer on this GPU and runs its default"
        return f"{worth.engine} takes {source.text}"
    won = "" if source.gain is None else f", measured as {source.gain:.2f}x as fast as what ran before"
    made = "" if source.origin is None else f" ({source.origin}{', ' if source.elsewhere else ''}{source.elsewhere})"
    return f"{source.text}{made} is in use there{'' if worth.is_asked else ', by a guess'}{won}"


def _at_most(row: WorthRow, low: float, high: float) -> str:
    """From what share to what share of the pass; of the layer where the rest of the model is not known."""
    least, most = row.saved(low), row.saved(high)
    if least is None or most is None:
        return f"{_percent(1 - 1 / low, 1 - 1 / high)} of what the experts take"
    return f"at most about {_percent(least, most)}"


def _percent(least: float, most: float) -> str:
    if most < _LEAST:
        return "half a percent"
    low, high = f"{100 * least:.0f}", f"{100 * most:.0f}"
    return f"{high} %" if low == high else f"{low} to {high} %"


def _kernels(worth: Worth, row: WorthRow) -> str | None:
    gain = row.kernels
    if gain is None or gain.low <= 1:
        return None
    won = f"{gain.value:.2f}x the tuned engine's layer at {gain.tokens:,} tokens ({gain.source})"
    if row.kernels_run:
        return f"Our kernels run there already: {won}."
    of_pass = _at_most(row, gain.value, gain.value)
    if gain.triton != worth.triton and worth.triton:
        why = f"; they run where they were measured with the installed Triton, {worth.triton}, which `tune` does"
    else:
        why = ""
    return f"Our kernels can win {of_pass} of {_phase(row)}: measured as {won}{why}."
