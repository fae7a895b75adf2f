"""Turn a pasted log, and the flags beside it, into one launch; print ready commands where several fit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sglang_moe_ext.cli import engine_choice, guessed_commands
from sglang_moe_ext.core import ModelError, MoEModel, TableError, TableKey
from sglang_moe_ext.engines import missing_config_log, model_guesses
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.missing_config_log import LaunchHints, MissingTable
from sglang_moe_ext.engines.model_guesses import KnownModel, LaunchGuess, LaunchLimits
from sglang_moe_ext.models import resolve
from sglang_moe_ext.models.builtin import builtin_records
from sglang_moe_ext.models.checkpoint_names import NameMatch, match_name
from sglang_moe_ext.models.config_fields import show

LARGEST_BYTES = 64 << 20
_LONGEST_PATH = 4096


@dataclass(frozen=True, slots=True)
class StatedLaunch:
    """What the flags beside --from-log say; None where they say nothing. `model` is already resolved."""

    model: MoEModel | None = None
    tp: int | None = None
    ep: int | None = None
    redundant_experts: int = 0
    engine: EngineName | None = None


@dataclass(frozen=True, slots=True)
class ChosenLaunch:
    """The launch that asks for the pasted table, and what the user must know of how it was found."""

    guess: LaunchGuess
    key: TableKey
    notes: tuple[str, ...]


def read_text(argument: str) -> str:
    """The text itself, or the content of the file that it names.

    Raises:
        TableError: the file cannot be read.
    """
    if len(argument) > _LONGEST_PATH or "\n" in argument or "\0" in argument:
        return argument
    path = os.path.expanduser(argument)
    if not os.path.isfile(path):
        return argument
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise TableError(
            f"--from-log: cannot read {show(argument)} ({error.strerror}); paste the line itself"
        ) from error


def choose_launch(text: str, stated: StatedLaunch, versions: Mapping[EngineName, tuple[int, int, int]]) -> ChosenLaunch:
    """The launch that asks for the table that the text says is missing.

    Raises:
        ModelError: none is known, or several that differ; the commands for those are printed.
        TableError: the text names no missing table.
    """
    missing = missing_config_log.find_missing_table(text)
    engine, notes = _find_engine(missing, stated)
    source, guesses = _find_guesses(missing, stated, engine, versions[engine])
    if not guesses:
        raise _refuse_unknown(missing, stated, engine)
    plain = [guess for guess in guesses if guess.is_plain]
    certain = guesses if source else plain
    if len({guess.layer for guess in certain}) != 1:
        raise _ask(missing, guesses, _redundant(missing.hints, stated), plain)
    chosen = certain[0]
    notes += _explain(missing, chosen, source, certain, guesses)
    return ChosenLaunch(chosen, missing.key, tuple(notes))


def _find_engine(missing: MissingTable, stated: StatedLaunch) -> tuple[EngineName, list[str]]:
    if stated.engine is None:
        return missing.engine or engine_choice.choose(None), []
    if missing.engine not in (None, stated.engine):
        note = f"--from-log: the line is {_TITLES[missing.engine]}'s, and is read as {_TITLES[stated.engine]}'s"
        return stated.engine, [f"{note} because --engine says so"] if missing.engine else []
    return stated.engine, []


_TITLES: dict[EngineName | None, str] = {"sglang": "SGLang", "vllm": "vLLM", None: "no engine"}


def _find_guesses(
    missing: MissingTable, stated: StatedLaunch, engine: EngineName, version: tuple[int, int, int]
) -> tuple[str, list[LaunchGuess]]:
    """(What names the model: a flag or the log, "" for none; the launches that ask for the table).

    What the log says of the launch is left out again where no launch agrees with it.
    """
    for source, models in _known_models(missing.hints, stated, engine):
        for limits in _limits(missing.hints, stated, version):
            guesses = model_guesses.guess_launches(missing.key, models, limits, engine)
            if guesses:
                return source, guesses
    return "", []


def _known_models(
    hints: LaunchHints, stated: StatedLaunch, engine: EngineName
) -> Iterator[tuple[str, list[KnownModel]]]:
    if stated.model is not None:
        yield "--model", [_with_siblings(stated.model)]
        return
    if hints.model is not None:
        found = _resolve_hint(hints.model)
        if found is not None:
            yield "the log's own launch line", [_with_siblings(found)]
    yield "", [KnownModel(it.model, it.quantizations) for it in builtin_records() if engine in it.engines]


def _with_siblings(model: MoEModel) -> KnownModel:
    """The model, and the quantizations of the built-in one with the same experts."""
    sizes = (model.architecture, model.routed_experts, model.top_k, model.hidden_size, model.intermediate_size)
    for record in builtin_records():
        it = record.model
        if (it.architecture, it.routed_experts, it.top_k, it.hidden_size, it.intermediate_size) == sizes:
            return KnownModel(model, tuple(dict.fromkeys((model.quantization, *record.quantizations))))
    return KnownModel(model, (model.quantization,))


def _resolve_hint(name: str) -> MoEModel | None:
    """The model of a launch line, where it is built in or lies here; the hub is not asked."""
    match = match_name(name)
    if isinstance(match, NameMatch):
        return match.model
    try:
        return resolve(name) if os.path.exists(name) else None
    except ModelError:
        return None


def _limits(hints: LaunchHints, stated: StatedLaunch, version: tuple[int, int, int]) -> Iterator[LaunchLimits]:
    """The flags with all that the log says, with its ranks alone, and alone."""
    flags = LaunchLimits(stated.tp, stated.ep, redundant_experts=_redundant(hints, stated), engine_version=version)
    ranks = replace(flags, least_tp=hints.least_tp, least_ep=hints.least_ep)
    yield replace(ranks, tp=stated.tp or hints.tp, ep=stated.ep or hints.ep)
    yield ranks
    yield flags


def _redundant(hints: LaunchHints, stated: StatedLaunch) -> int:
    return stated.redundant_experts or hints.redundant_experts


def _explain(
    missing: MissingTable,
    chosen: LaunchGuess,
    source: str,
    certain: Sequence[LaunchGuess],
    guesses: Sequence[LaunchGuess],
) -> list[str]:
    notes: list[str] = []
    if source:
        notes.append(f"--from-log: {source} says {chosen.model.name}, which asks for this table {_at(chosen)}")
    else:
        names = ", ".join(dict.fromkeys(guess.model.name for guess in certain))
        notes.append(
            f"--from-log: a guess: {names} {'asks' if ',' not in names else 'ask'} for this table {_at(chosen)}; its "
            "name holds neither hidden size nor top-k: add --model if yours is another"
        )
        rest = [guess for guess in guesses if guess.layer != chosen.layer]
        if rest:
            others = ", ".join(f"{guess.model.name} {_at(guess)}" for guess in rest[:3])
            notes.append(f"--from-log: less likely, {others}{' and more' if len(rest) > 3 else ''}")
    if missing.others:
        name = model_guesses.file_name(missing.others[0], chosen.engine)
        notes.append(f"--from-log: the log names {len(missing.others)} more missing tables: paste the line of {name}")
    return notes


def _at(guess: LaunchGuess) -> str:
    ep = guess.parallelism.ep
    return f"at --tp-size {guess.parallelism.tp}{f' --ep-size {ep}' if ep > 1 else ''}"


def _ask(
    missing: MissingTable, guesses: Sequence[LaunchGuess], redundant: int, plain: Sequence[LaunchGuess]
) -> ModelError:
    """Print a command for each guess, and give the error that says so."""
    print(f"launches of built-in models that ask for {model_guesses.file_name(missing.key, guesses[0].engine)}:")
    guessed_commands.print_commands(guesses, missing.key.device_name, redundant)
    key = missing.key
    stated_dtype = f",dtype={key.scheme}" if key.scheme else ""
    print(f"  sglang-moe-ext tune --shape E={key.experts},N={key.intermediate_size},K=...,topk=...{stated_dtype}")
    why = (
        "several models ask for that table" if plain else "only unusual launches of built-in models ask for that table"
    )
    return ModelError(
        f"--from-log: {why}, and its name holds no K and top-k: run one of the commands above, or add --model"
    )


def _refuse_unknown(missing: MissingTable, stated: StatedLaunch, engine: EngineName) -> ModelError:
    key = missing.key
    if stated.model is not None:
        return ModelError(
            f"--from-log: no launch of {stated.model.name} with these flags asks for "
            f"{model_guesses.file_name(key, engine)}: check --model, --tp-size and --ep-size, or leave --from-log out"
        )
    return ModelError(
        f"--from-log: no built-in model asks for a table of E={key.experts}, N={key.intermediate_size}, and the line "
        "does not say its hidden size and top-k: add --model, or "
        f"--shape E={key.experts},N={key.intermediate_size},K=...,topk=..."
    )
