"""Finds the part of a config that describes the experts, however deep it is wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sglang_moe_ext.shapes.families import COMMON, EXPERTS, FAMILIES, PARTS, Family, Names
from sglang_moe_ext.shapes.fields import Section, lineages, read


@dataclass(frozen=True, slots=True)
class Experts:
    """The part, the config that it is a part of, and the names that hold in it."""

    root: Section
    section: Section
    family: Family

    def first(self, names: Names, places: tuple[Section, ...] | None = None) -> tuple[str, object] | None:
        """The first of the names that is stated, with its value."""
        for place in self._places() if places is None else places:
            for name in names:
                value = read(place, name)
                if value is not None:
                    return name, value
        return None

    def _places(self) -> Iterator[Section]:
        yield self.section
        for name in PARTS:
            yield read(self.section, name)

    def has_moe_layers(self) -> bool:
        layers = self.first(self.family.layer_lists)
        if layers is None or not isinstance(layers[1], (list, tuple, str)):
            return True
        return any(kind in layers[1] for kind in self.family.moe_layers)


def located(config: Section) -> Experts | None:
    """None for a dense model."""
    for lineage in lineages(config):
        root, section = lineage[0], lineage[-1]
        experts = Experts(root, section, _family(section, root))
        found = experts.first(EXPERTS)
        if found is not None and found[1] not in (0, 1) and experts.has_moe_layers():
            return experts
    return None


def _family(section: Section, root: Section) -> Family:
    for key in (*_identities(section), *_identities(root)):
        if key in FAMILIES:
            return FAMILIES[key]
    return COMMON


def _identities(section: Section) -> Iterator[str]:
    """Model type, then architectures."""
    model_type = read(section, "model_type")
    if isinstance(model_type, str):
        yield model_type
    architectures = read(section, "architectures")
    if isinstance(architectures, (list, tuple)):
        yield from (name for name in architectures if isinstance(name, str))
