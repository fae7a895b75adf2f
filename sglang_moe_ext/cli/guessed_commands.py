"""Print guessed launches as commands that are ready to run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from sglang_moe_ext.core import ModelError, MoEModel, MoEShape, Quantization
from sglang_moe_ext.engines.model_guesses import LaunchGuess
from sglang_moe_ext.models import parse_dtype_flag
from sglang_moe_ext.models.checkpoint_names import NameMatch, match_name

_MOST_COMMANDS = 12


def print_commands(guesses: Sequence[LaunchGuess], device_name: str, redundant_experts: int) -> None:
    """Print a command for each layer that is guessed, the likeliest first."""
    alike = _by_layer(guesses)
    for first, *others in alike[:_MOST_COMMANDS]:
        also = f"  # the same for {', '.join(guess.model.name for guess in others)}" if others else ""
        print(f"  {command(first, device_name, redundant_experts)}{also}")
    if len(alike) > _MOST_COMMANDS:
        print(f"  and {len(alike) - _MOST_COMMANDS} more: say --tp-size to see fewer")


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
