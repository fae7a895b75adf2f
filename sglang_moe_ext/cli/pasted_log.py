"""Turn a pasted log, and the flags beside it, into one launch; print ready commands where several fit."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sglang_moe_ext.core import ModelError, MoEModel, MoEShape, Quantization, TableError, TableKey
from sglang_moe_ext.engines import launch_guesses, missing_config_log
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.launch_guesses import KnownModel, LaunchGuess, LaunchLimits
from sglang_moe_ext.engines.missing_config_log import LaunchHints, MissingTable
from sglang_moe_ext.models import parse_dtype_flag, resolve
from sglang_moe_ext.models.builtin import builtin_records
from sglang_moe_ext.models.checkpoint_names import NameMatch, match_name
from sglang_moe_ext.models.config_fields import show

LARGEST_BYTES = 64 << 20
_LONGEST_PATH = 4096
_MOST_COMMANDS = 12


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


def choose_launch(text: str, stated: StatedLaunch, engine_version: tuple[int, int, int]) -> ChosenLaunch:
    """The launch that asks for the table that the text says is missing.

    Raises:
        ModelError: none is known, or several that differ; the commands for those are printed.
        TableError: the text names no missing table.
    """
    missing = missing_config_log.find_missing_table(text)
    engine, notes = _find_engine(missing, stated)
    source, guesses = _find_guesses(missing, stated, engine, engine_version)
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
        return missing.engine or "sglang", []
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
            guesses = launch_guesses.guess_launches(missing.key, models, limits, engine)
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
        name = launch_guesses.file_name(missing.others[0], chosen.engine)
        notes.append(f"--from-log: the log names {len(missing.others)} more missing tables: paste the line of {name}")
    return notes


def _at(guess: LaunchGuess) -> str:
    ep = guess.parallelism.ep
    return f"at --tp-size {guess.parallelism.tp}{f' --ep-size {ep}' if ep > 1 else ''}"


def _ask(
    missing: MissingTable, guesses: Sequence[LaunchGuess], redundant: int, plain: Sequence[LaunchGuess]
) -> ModelError:
    """Print a command for each guess, and give the error that says so."""
    device = missing.key.device_name
    print(f"launches of built-in models that ask for {launch_guesses.file_name(missing.key, guesses[0].engine)}:")
    alike = _by_layer(guesses)
    for first, *others in alike[:_MOST_COMMANDS]:
        also = f"  # the same for {', '.join(guess.model.name for guess in others)}" if others else ""
        print(f"  {command(first, device, redundant)}{also}")
    if len(alike) > _MOST_COMMANDS:
        print(f"  and {len(alike) - _MOST_COMMANDS} more: say --tp-size to see fewer")
    key = missing.key
    stated_dtype = f",dtype={key.scheme}" if key.scheme else ""
    print(f"  sglang-moe-ext tune --shape E={key.experts},N={key.intermediate_size},K=...,topk=...{stated_dtype}")
    why = (
        "several models ask for that table" if plain else "only unusual launches of built-in models ask for that table"
    )
    return ModelError(
        f"--from-log: {why}, and its name holds no K and top-k: run one of the commands above, or add --model"
    )


def _by_layer(guesses: Sequence[LaunchGuess]) -> list[list[LaunchGuess]]:
    """Guesses between which nothing needs to be asked, together; the likeliest first."""
    alike: dict[MoEShape, list[LaunchGuess]] = {}
    for guess in guesses:
        alike.setdefault(guess.layer, []).append(guess)
    return list(alike.values())


def command(guess: LaunchGuess, device_name: str, redundant_experts: int = 0) -> str:
    """The command that tunes this guess."""
    split = {
        "--tp-size": guess.parallelism.tp,
        "--ep-size": guess.parallelism.ep if guess.parallelism.ep > 1 else 0,
        "--ep-num-redundant-experts": redundant_experts,
    }
    model = _model_flags(guess.model)
    layer = ["--shape", str(guess.shape)] if model is None else list(model)
    if model is not None:
        layer += [word for flag, size in split.items() if size for word in (flag, str(size))]
        layer += [] if guess.fuses_shared_experts else ["--disable-shared-experts-fusion"]
    engine = ["--engine", "vllm"] if guess.engine == "vllm" else []
    return shlex.join(["sglang-moe-ext", "tune", *engine, *layer, "--gpu", device_name])


_FP8_NAMES = ("", "-FP8", "-FP8-dynamic", "-FP8-block", "-AWQ")


def _model_flags(model: MoEModel) -> tuple[str, ...] | None:
    """Flags that mean this model in this quantization; None where no flags can say it."""
    for ending in _FP8_NAMES:
        match = match_name(f"{model.name}{ending}")
        if isinstance(match, NameMatch) and match.model.quantization == model.quantization:
            return "--model", f"{model.name}{ending}"
    match = match_name(model.name)
    if not isinstance(match, NameMatch):
        return None
    dtype = model.quantization.scheme or "bf16"
    for flags in (("--dtype", dtype), ("--dtype", dtype, "--per-channel-quant")):
        if _dtype_means(flags, match.model.quantization) == model.quantization:
            return "--model", model.name, *flags
    return None


def _dtype_means(flags: Sequence[str], checkpoint: Quantization) -> Quantization | None:
    try:
        return parse_dtype_flag(flags[1], checkpoint=checkpoint, per_channel="--per-channel-quant" in flags)
    except ModelError:
        return None


def _refuse_unknown(missing: MissingTable, stated: StatedLaunch, engine: EngineName) -> ModelError:
    key = missing.key
    if stated.model is not None:
        return ModelError(
            f"--from-log: no launch of {stated.model.name} with these flags asks for "
            f"{launch_guesses.file_name(key, engine)}: check --model, --tp-size and --ep-size, or leave --from-log out"
        )
    return ModelError(
        f"--from-log: no built-in model asks for a table of E={key.experts}, N={key.intermediate_size}, and the line "
        "does not say its hidden size and top-k: add --model, or "
        f"--shape E={key.experts},N={key.intermediate_size},K=...,topk=..."
    )
