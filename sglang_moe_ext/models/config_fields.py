"""Reads fields of an untrusted config, and words the errors about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sglang_moe_ext import untrusted
from sglang_moe_ext.core import ModelError

Section = object
"""A config or a part of one: a mapping out of JSON, or an object of a config class."""

CONFIG_CLASS_ERRORS = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What a property of a config class may raise; transformers' AmbiguousGlobalPerLayerAttributeError is of these."""

WRAPPERS = (
    "text_config",
    "llm_config",
    "language_config",
    "language_model_config",
    "thinker_config",
    "decoder_config",
    "talker_config",
)
"""Where a multimodal config keeps its language models, the one that a server spends its time in first."""

DEEPEST = 5
LARGEST = 1 << 20
"""Above any expert count or width of a real model, and small enough to compute with."""


_LONGEST = 100
"""Characters of a value in an error message."""


def show(value: object) -> str:
    """The value in an error message: short, on one line, a text in quotes."""
    shown = untrusted.show(value, _LONGEST)
    return f"'{shown}'" if isinstance(value, str) else shown


def describe_error(error: Exception) -> str:
    """The error's class and message, short."""
    return f"{type(error).__name__}: {show(str(error))}"


def refusal(source: str, complaint: str) -> ModelError:
    """An error in one printable line, also where its parts come from a stranger's file."""
    line = "".join(letter if letter.isprintable() else " " for letter in f"{source}: {complaint}")
    return ModelError(" ".join(line.split()))


def read_field(section: Section, name: str) -> object:
    """The field, or None where there is none; a field that cannot be read as one value counts as not there."""
    if isinstance(section, Mapping):
        return section.get(name)
    try:
        return getattr(section, name, None)
    except CONFIG_CLASS_ERRORS:
        return None


def whole_number(value: object, name: str, source: str, *, at_least: int = 1) -> int:
    """Raises: ModelError when the value is not an integer of a believable size."""
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= LARGEST:
        raise refusal(
            source,
            f"{name} is {show(value)}, expected a whole number from {at_least} to {LARGEST}; "
            "correct it, or state the experts with --shape",
        )
    return value


def lineages(config: Section, above: tuple[Section, ...] = ()) -> Iterator[tuple[Section, ...]]:
    """Each part that may be a language model, as (root, ..., part); the innermost and most likely one first."""
    lineage = (*above, config)
    if len(lineage) <= DEEPEST:
        for part in _parts(config):
            yield from lineages(part, lineage)
    yield lineage


def _parts(config: Section) -> Iterator[Section]:
    text = _text_config(config)
    if text is not None:
        yield text
    for wrapper in WRAPPERS:
        part = read_field(config, wrapper)
        if isinstance(part, Mapping) or hasattr(part, "__dict__"):
            yield part


def _text_config(config: Section) -> Section | None:
    """What the config class itself names as its language model, when that is another config."""
    if isinstance(config, Mapping):
        return None
    choose = read_field(config, "get_text_config")
    if not callable(choose):
        return None
    try:
        chosen: object = choose()
    except CONFIG_CLASS_ERRORS:
        return None
    return chosen if chosen is not config and hasattr(chosen, "__dict__") else None
