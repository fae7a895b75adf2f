"""Read what users paste from a server's log about a missing table: lines of SGLang or vLLM, or a whole log."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sglang_moe_ext.core import TableError, TableKey
from sglang_moe_ext.engines import table_names
from sglang_moe_ext.engines.adapter import EngineName

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_QUOTING = re.compile(r"^(?:\[\d+,\d+\]<std(?:out|err|diag)>:?|[\s>|*`'\"\u201c\u2018\u2502\u2503])+")
"""What mail, chat, markdown and mpirun (--tag-output) put before a line."""
_FRAME = "|`\u2502\u2503 \t"
"""What a box or a code span leaves at the end of one."""
_ESCAPES = (("\\_", "_"), ("%20", ""), ("&quot;", ""), ("&nbsp;", ""))

# All below are searched in a text without white space, so that a line may be broken at any place.
_NAME = re.compile(
    r"E=\d+,N=\d+,device_name=[\w.+()-]+?(?:,dtype=\w+?)?(?:,block_shape=\[\d+,\d+\])?(?:,per_channel_quant=True)?"
    r"(?:_down)?\.json",
    re.ASCII,
)
_MISSING = re.compile(r"notfoundat", re.IGNORECASE)
_FOUND = re.compile(r"(?:configfrom|configurationfrom)[^,;]*$", re.IGNORECASE)
_MARKS: tuple[tuple[re.Pattern[str], EngineName], ...] = (
    (re.compile(r"/sglang/|fused_moe_triton/|moe_runner/|triton_utils/|/triton_\d+_\d+"), "sglang"),
    (re.compile(r"/vllm/|model_executor/layers/fused_moe/"), "vllm"),
    (re.compile(r"MoEkernelconfig|DownMoEconfigfile|withdown_moe="), "sglang"),
    (re.compile(r"UsingdefaultMoEconfig\.|\(EngineCore|\(Worker|\(VllmWorker"), "vllm"),
)
"""What the two engines write around a name, and in their paths; the mark that is nearest to the name decides."""
_BEFORE = 600
"""Characters before a name that are searched for marks."""

_RANK = r"[\[(][^\])\n]{{0,80}}?(?<![A-Za-z0-9]){letters}(\d{{1,4}})(?!\d)"
_TP_RANK, _EP_RANK = (re.compile(_RANK.format(letters=letters)) for letters in ("TP", "EP"))
_STATED = {
    "model": re.compile(
        r"(?:\bmodel(?:_path)?['\"]?\s*[=:]\s*|--model(?:-path)?[ =]|\bvllm serve )['\"]?([^'\"\s,)]+)"
    ),
    "tp": re.compile(
        r"(?:\b(?:tp_size|tensor_parallel_size)['\"]?\s*[=:]\s*|--(?:tp|tp-size|tensor-parallel-size)[ =]|\s-tp )(\d+)"
    ),
    "ep": re.compile(r"(?:\bep_size['\"]?\s*[=:]\s*|--(?:ep|ep-size|expert-parallel-size)[ =])(\d+)"),
    "redundant": re.compile(r"ep[_-]num[_-]redundant[_-]experts['\"]?\s*[=: ]\s*(\d+)"),
    "all_ranks": re.compile(r"(?:--enable-expert-parallel|enable_expert_parallel['\"]?\s*[=:]\s*True)"),
}
"""What a launch line, or the arguments that a server prints at its start, say of the launch."""


@dataclass(frozen=True, slots=True)
class LaunchHints:
    """What a log says of the launch. `least_tp` and `least_ep` follow from the highest ranks in its prefixes."""

    model: str | None = None
    tp: int | None = None
    ep: int | None = None
    redundant_experts: int = 0
    least_tp: int = 1
    least_ep: int = 1


@dataclass(frozen=True, slots=True)
class MissingTable:
    """A table that a server looked for. `engine` None: nothing in the text tells which engine it was.

    `others` are further tables that the text says are missing.
    """

    key: TableKey
    engine: EngineName | None
    hints: LaunchHints
    others: tuple[TableKey, ...] = ()


def find_missing_table(text: str) -> MissingTable:
    """The first table that the text says was not found; a text without such words may be the table's name alone.

    Raises:
        TableError: the text names no table, or only tables that were found.
    """
    joined = _join(text)
    named = [(match, _is_missing(joined, match)) for match in _NAME.finditer(joined)]
    missing = [match for match, is_missing in named if is_missing]
    if not missing and named:
        found = [match for match, _ in named if _FOUND.search(joined[max(0, match.start() - _BEFORE) : match.start()])]
        if found:
            raise TableError(
                f"--from-log: the text says that {found[0][0]} was found, and of no table that it is missing; "
                "paste the line with 'Config file not found'"
            )
        missing = [named[0][0]]
    if not missing:
        raise TableError(
            "--from-log: the text names no table; expected a server's line, or its log, with "
            ".../E=...,N=...,device_name=....json"
        )
    keys = [table_names.parse(match[0]) for match in missing]
    return MissingTable(
        key=keys[0],
        engine=_find_engine(text, joined, missing[0]),
        hints=_read_hints(text),
        others=tuple(_others(keys)),
    )


def _join(text: str) -> str:
    """The text without white space, colours, and what quoting put before its lines."""
    plain = _COLOURS.sub("", text)
    for escape, meant in _ESCAPES:
        plain = plain.replace(escape, meant)
    return "".join("".join(_QUOTING.sub("", line).rstrip(_FRAME).split()) for line in plain.splitlines())


def _is_missing(joined: str, name: re.Match[str]) -> bool:
    """Whether "not found at" is the last thing said before the name, not about an earlier file."""
    before = joined[max(0, name.start() - _BEFORE) : name.start()]
    said = list(_MISSING.finditer(before))
    return bool(said) and ".json" not in before[said[-1].end() :]


def _find_engine(text: str, joined: str, name: re.Match[str]) -> EngineName | None:
    before = joined[max(0, name.start() - _BEFORE) : name.start()]
    marks = [(match.end(), engine) for pattern, engine in _MARKS for match in pattern.finditer(before)]
    if marks:
        return max(marks)[1]
    return _find_engine_by_spelling(text, table_names.parse(name[0]))


def _find_engine_by_spelling(text: str, key: TableKey) -> EngineName | None:
    """SGLang writes a space into block_shape, and has two parts of a name that vLLM never writes."""
    if key.down or key.per_channel:
        return "sglang"
    if key.block_shape is None:
        return None
    one, other = key.block_shape
    if f"[{one},{other}]" in text:
        return "vllm"
    return "sglang" if f"[{one}, {other}]" in text else None


def _others(keys: list[TableKey]) -> Iterator[TableKey]:
    """Each further layer once: the table of a down projection is tuned with that of its layer."""
    seen = {_layer(keys[0])}
    for key in keys:
        if _layer(key) not in seen:
            seen.add(_layer(key))
            yield key


def _layer(key: TableKey) -> tuple[object, ...]:
    return key.experts, key.intermediate_size, key.device_name, key.scheme, key.block_shape, key.per_channel


def _read_hints(text: str) -> LaunchHints:
    def number(name: str) -> int | None:
        match = _STATED[name].search(text)
        return None if match is None else min(int(match[1]), 1 << 16)

    model, tp, ep = _STATED["model"].search(text), number("tp"), number("ep")
    if ep is None and _STATED["all_ranks"].search(text):
        ep = tp
    return LaunchHints(
        model=None if model is None else model[1],
        tp=tp,
        ep=ep,
        redundant_experts=number("redundant") or 0,
        least_tp=1 + max((int(rank) for rank in _TP_RANK.findall(text)), default=0),
        least_ep=1 + max((int(rank) for rank in _EP_RANK.findall(text)), default=0),
    )


def device_of(key: TableKey) -> str:
    """The name of the GPU, as far as a file name tells it."""
    return key.device_name.replace("_", " ")
