"""Which MoE layers a model has, under which module names, and which of them an exclusion list covers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sglang_moe_ext.core import ModelError, Quantization
from sglang_moe_ext.models.config_fields import Section, lineages, read_field, refusal

LISTS = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
"""Spellings of the list of modules that a checkpoint leaves as they were."""
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MOST_ENTRIES = 1 << 18
"""384 experts of 61 layers with three projections are 70,272 names."""
MOST_LAYERS = 512
_LONGEST_S = 5.0
_UNNAMED_LAYERS = (100_003, 100_019)
"""Stand for all layers of a model that does not say how many it has: no entry names one of these by its number."""
_BLOCKS = {
    "feed_forward": ("llama4", "llama4_text"),
    "block_sparse_moe": ("mixtral", "minimax", "minimax_m2", "phimoe", "granitemoe", "granitemoeshared"),
    "mixer": ("nemotron_h", "nemotron_h_puzzle"),
}
"""What a layer calls its MoE block, by model type (SGLang 0.5.23, models/); elsewhere `mlp`."""
_NAMED_BLOCK = re.compile(r"layers\.\d+\.(\w+)\.experts")
_ROOTS = ("model",)
_NESTED_ROOTS = ("language_model.model", "model.language_model", "model")
"""Engines rename a checkpoint's modules to their own; an entry may use either name."""


@dataclass(frozen=True, slots=True)
class ExpertModules:
    """The MoE layers of one model; each is a tuple of the names that its module of experts may have."""

    layers: tuple[tuple[str, ...], ...]

    @property
    def count(self) -> int:
        return len(self.layers)


Covers = Callable[[str], bool]
"""Whether a list covers the module of experts of that name."""


def locate_modules(config: Section, entries: Iterable[str] = ()) -> ExpertModules:
    """`entries`: names of the checkpoint's modules, which may tell what it calls its MoE block."""
    numbers, part, is_nested = _number_layers(config)
    block = _block(part, entries)
    roots = _NESTED_ROOTS if is_nested else _ROOTS
    if block == "mixer":
        roots = (*roots, "backbone")
    return ExpertModules(
        tuple(tuple(f"{root}.layers.{number}.{block}.experts" for root in roots) for number in numbers)
    )


def _number_layers(config: Section) -> tuple[Sequence[int], Section, bool]:
    """The numbers of the MoE layers, the part of the config that counts them, and whether that is a part of another."""
    for lineage in lineages(config):
        part = lineage[-1]
        for name in ("num_hidden_layers", "num_layers", "n_layer"):
            count = read_field(part, name)
            if isinstance(count, int) and not isinstance(count, bool) and 0 < count <= MOST_LAYERS:
                numbers = [number for number in range(count) if _has_experts(part, number)]
                return numbers or range(count), part, len(lineage) > 1
    return _UNNAMED_LAYERS, config, False


def _has_experts(part: Section, number: int) -> bool:
    """Whether that layer is an MoE layer, as far as the common fields tell."""
    first = read_field(part, "first_k_dense_replace")
    if isinstance(first, int) and number < first:
        return False
    dense = read_field(part, "mlp_only_layers")
    if isinstance(dense, (list, tuple)) and number in dense:
        return False
    kinds = next(
        (found for name in ("layers_block_type", "hybrid_override_pattern") if (found := read_field(part, name))), None
    )
    if isinstance(kinds, (list, tuple, str)) and number < len(kinds) and ({"moe", "E"} & set(map(str, kinds))):
        return kinds[number] in ("moe", "E")
    return _is_on_step(part, number)


def _is_on_step(part: Section, number: int) -> bool:
    frequency = read_field(part, "moe_layer_freq")
    if isinstance(frequency, (list, tuple)):
        return number >= len(frequency) or frequency[number] != 0
    if isinstance(frequency, int) and frequency > 1:
        return number % frequency == 0
    step = read_field(part, "decoder_sparse_step")
    if isinstance(step, int) and step > 1:
        return (number + 1) % step == 0
    step = read_field(part, "interleave_moe_layer_step")
    return not (isinstance(step, int) and step > 1) or (number + 1) % step == 0


def _block(part: Section, entries: Iterable[str]) -> str:
    for entry in entries:
        named = _NAMED_BLOCK.search(entry)
        if named is not None:
            return named[1]
    model_type = read_field(part, "model_type")
    return next((block for block, types in _BLOCKS.items() if model_type in types), "mlp")


def list_entries(section: Section, source: str) -> list[str]:
    """What the section excludes, in all spellings of the list.

    Raises: ModelError when there are more entries than any checkpoint has modules.
    """
    entries: list[str] = []
    for name in LISTS:
        stated = read_field(section, name)
        if isinstance(stated, (list, tuple)):
            if len(stated) + len(entries) > MOST_ENTRIES:
                raise refusal(source, f"{name} has {len(stated)} entries, expected at most {MOST_ENTRIES}; shorten it")
            entries += [entry for entry in stated if isinstance(entry, str)]
    return entries


def excludes_experts(modules: ExpertModules, covers: Covers, source: str) -> bool:
    """Whether the experts of the model are left out of its quantization.

    Where a few layers alone are, the model's experts are what the others are: as a checkpoint's draft layers, or the
    first and last ones.

    Raises: ModelError when most layers, and not all, are left out: they need another table than the rest.
    """
    excluded = sum(any(map(covers, names)) for names in within_time(modules.layers, source))
    if 2 * excluded > modules.count > excluded:
        raise refusal(
            source,
            f"the experts of {excluded} of {modules.count} MoE layers are not quantized, and those of the others are: "
            "each kind reads a table of its own; state one with --shape, once with its dtype and once without",
        )
    return 0 < modules.count == excluded


def within_time(layers: Iterable[tuple[str, ...]], source: str) -> Iterator[tuple[str, ...]]:
    """The layers, one after the other.

    Raises: ModelError when what is asked of each of them takes longer than any real checkpoint's lists do.
    """
    end = time.monotonic() + _LONGEST_S
    for names in layers:
        if time.monotonic() > end:
            raise refusal(
                source, f"its lists of modules take over {_LONGEST_S:.0f} s to read; state the experts with --shape"
            )
        yield names


def cover_by_path(entries: Iterable[str]) -> Covers:
    """As SGLang's `is_layer_skipped` does for fp8 (0.5.15 to 0.5.23, quantization/utils.py), with or without `model.`.

    An entry covers a module below it, or that contains its dotted path; one that names a part of a layer's experts
    covers all of that layer.
    """
    paths, experts = set[str](), set[str]()
    for entry in entries:
        path = entry.rstrip(".")
        bare = path.removeprefix("model.")
        paths |= {path, bare, f"model.{bare}"}
        if ".experts" in path:
            above = path[: path.index(".experts") + len(".experts")]
            experts |= {above, f"model.{above.removeprefix('model.')}"}
    return lambda name: name in experts or not paths.isdisjoint(_dotted_runs(name))


def _dotted_runs(name: str) -> Iterator[str]:
    parts = name.split(".")
    for first in range(len(parts)):
        for last in range(first, len(parts)):
            yield ".".join(parts[first : last + 1])


def cover_by_substring(entries: Iterable[str]) -> Covers:
    """As SGLang's `is_layer_skipped_awq` does for awq and moe_wna16: an entry is a part of the module's name."""
    parts = frozenset(entries)
    return lambda name: not parts.isdisjoint(_substrings(name))


def _substrings(name: str) -> Iterator[str]:
    """All of them: a name is short, and a list of entries may be long."""
    for first in range(len(name)):
        for end in range(first, len(name) + 1):
            yield name[first:end]


def cover_by_glob(entries: Iterable[str]) -> Covers:
    """As ModelOpt's lists are read (SGLang 0.5.23, modelopt_quant.py): a star matches anything, in a name or a part."""
    plain = {entry for entry in entries if re.fullmatch(r"[\w.-]*", entry)}
    globs = [
        compiled
        for entry in dict.fromkeys(entries)
        if entry not in plain and (compiled := compile_pattern(_as_pattern(entry))) is not None
    ]

    def covers(name: str) -> bool:
        names = {name, name.removeprefix("language_model."), *name.split(".")}
        return not plain.isdisjoint(names) or any(glob.fullmatch(one) for glob in globs for one in names)

    return covers


def _as_pattern(glob: str) -> str:
    return re.sub(r"\*+", "*", glob).replace(".", r"\.").replace("*", ".*")


_MOST_REPEATS, _LONGEST_PATTERN = 4, 400
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")
_REPEAT = re.compile(r"(?<!\\)[*+]|(?<!\\)\{\d*,\d*\}")


def compile_pattern(pattern: str) -> re.Pattern[str] | None:
    """None for one that is no pattern, or that a stranger may have written to never end.

    Without repeated groups and with few repeats, matching a module's name takes polynomial time of a small degree.
    """
    if len(pattern) > _LONGEST_PATTERN or _REPEATED_GROUP.search(pattern):
        return None
    if len(_REPEAT.findall(pattern)) > _MOST_REPEATS:
        return None
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return None


def names_experts(pattern: str) -> bool:
    """True where a pattern speaks of routed experts of all layers: for patterns that are not run."""
    is_about_experts = "experts" in pattern and "shared" not in pattern and "(?!" not in pattern
    return is_about_experts and not any(letter.isdigit() for letter in pattern.replace("[0-9]", ""))


@dataclass(frozen=True, slots=True)
class Targets:
    """Targets of compressed-tensors: names, and patterns behind `re:`. `unread` are patterns that are not run."""

    names: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]
    unread: tuple[str, ...]

    def match_name(self, name: str) -> bool:
        """Whether one of them is the name, or a pattern that matches from its first letter on."""
        return name in self.names or self._match_pattern(name)

    def match_suffix(self, name: str) -> bool:
        """The same, where a name may also lack what stands before one of its dots."""
        parts = name.split(".")
        suffixes = (".".join(parts[first:]) for first in range(len(parts)))
        return not self.names.isdisjoint(suffixes) or self._match_pattern(name)

    def _match_pattern(self, name: str) -> bool:
        return any(pattern.match(name) for pattern in self.patterns) or any(map(names_experts, self.unread))


def parse_targets(stated: Iterable[str]) -> Targets:
    names, patterns, unread = set[str](), list[re.Pattern[str]](), list[str]()
    for target in stated:
        if not target.startswith("re:"):
            names.add(target)
        elif (compiled := compile_pattern(target[3:])) is not None:
            patterns.append(compiled)
        else:
            unread.append(target)
    return Targets(frozenset(names), tuple(patterns), tuple(unread))


def unfused_names(experts: str) -> tuple[str, ...]:
    """The modules that SGLang asks about, of all that a layer's experts were made of."""
    return tuple(f"{experts}.0.{projection}" for projection in PROJECTIONS)


def cover_by_target(entries: Iterable[str], source: str) -> Covers:
    """As SGLang's `should_ignore_layer` does for compressed-tensors since 0.5.18: the projections of the first expert.

    The function raises ModelError where some of the three are covered, and not all: an engine refuses such a layer.
    """
    targets = parse_targets(entries)

    def covers(experts: str) -> bool:
        covered = [targets.match_suffix(name) for name in unfused_names(experts)]
        if any(covered) and not all(covered):
            raise refusal(
                source,
                f"some projections of {experts} are not quantized, and others are: engines refuse such a layer; "
                "correct its list of ignored modules",
            )
        return all(covered)

    return covers


def cover_by_substring_of_child(entries: Iterable[str]) -> Covers:
    """As SGLang 0.5.10 to 0.5.17 read compressed-tensors' list: an entry that is a part of a name covers it."""
    entries = tuple(entries)
    plain = frozenset(entry.lower() for entry in entries if not entry.startswith("re:"))
    patterns = parse_targets(entry for entry in entries if entry.startswith("re:"))
    return lambda experts: all(
        not plain.isdisjoint(_substrings(name.lower())) or patterns.match_name(name) for name in unfused_names(experts)
    )


def refuse_mixed(kinds: Mapping[Quantization, int], what: str, source: str) -> ModelError:
    """The refusal of a model whose layers are stored in several ways: which, and how many layers each."""
    listed = ", ".join(f"{kind} in {count} layers" for kind, count in kinds.items())
    return refusal(
        source, f"{what} stores the experts of different layers differently ({listed}); state one of them with --shape"
    )
