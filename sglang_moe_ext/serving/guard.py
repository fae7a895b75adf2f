"""Check each configuration before it is launched: it must compile, compute right results, and fit shared memory."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from sglang_moe_ext.core import Gpu, MoEShape, Projection, TableError, TileConfig
from sglang_moe_ext.engines import config_dict, launch_rules
from sglang_moe_ext.engines.config_dict import ConfigDict
from sglang_moe_ext.engines.launch_rules import KernelLaunch, LaunchRule
from sglang_moe_ext.gpu.shared_memory import smem_bytes
from sglang_moe_ext.tables import config_table
from sglang_moe_ext.untrusted import show

log = logging.getLogger(__name__)

_FEWEST_STAGES, _SMALLEST_SIDE = 2, 32
_KIB = 1024


def degrade(config: TileConfig) -> Iterator[TileConfig]:
    """Yield ever smaller configurations: fewer stages, then a narrower N, then a shorter K, last one stage.

    BLOCK_SIZE_M stays: tokens are sorted into blocks of it. Halves of a BLOCK_SIZE_K divide what it divides, so a
    block of scales still holds whole tiles.
    """
    while config.num_stages > _FEWEST_STAGES:
        config = replace(config, num_stages=config.num_stages - 1)
        yield config
    while config.block_n > _SMALLEST_SIDE:
        config = replace(config, block_n=config.block_n // 2)
        yield config
    while config.block_k > _SMALLEST_SIDE:
        config = replace(config, block_k=config.block_k // 2)
        yield config
    if config.num_stages > 1:
        yield replace(config, num_stages=1)


@dataclass(frozen=True, slots=True)
class SafeEntry:
    """An entry that may be launched. `why`: what was changed, and what the engine alone would do; None: nothing was."""

    entry: ConfigDict
    why: str | None = None


@dataclass(frozen=True, slots=True)
class RefusedEntry:
    """An entry that nothing small can mend, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class EntryChange:
    """An entry as it was written, and why another one runs."""

    written: Mapping[str, Any]
    why: str


@dataclass(frozen=True, slots=True)
class ConfigGuard:
    """The rules of one release of an engine on one GPU. Without a known GPU, only a launch tells what fits."""

    version: tuple[int, int, int]
    gpu: Gpu | None
    engine: Literal["sglang", "vllm"] = "sglang"

    def check(self, entry: Any, shape: MoEShape, projection: Projection) -> SafeEntry | RefusedEntry:
        """A fresh entry that this GPU can run and that computes right results, or the reason why there is none.

        Each reason is logged once.
        """
        try:
            if self.gpu is not None and isinstance(entry, Mapping):
                entry = config_dict.for_target(entry, self.gpu.target)
            config = config_table.parse_tile(entry)
        except TableError as error:
            return self._refuse(f"{error}; the engine alone would end", shape, projection)
        match launch_rules.apply(KernelLaunch(self.engine, self.version, config, shape, projection)):
            case LaunchRule() as rule:
                return self._refuse(f"{config} breaks the rule that {rule.name}: {rule.harm}", shape, projection)
            case ruled:
                mended = [(describe_change(config, ruled.config, rule), rule.harm) for rule in ruled.mended]
        for change, harm in mended:
            warn_once(f"{change} of the {projection} projection of {shape}: {harm}")
        changes = [f"{change}: {harm}" for change, harm in mended]
        safe = _write_back(entry, config, ruled.config)
        fitted = fit_to_shared_memory(safe, shape, self.gpu)
        if fitted is not safe and self.gpu is not None:
            smaller = describe_changes(ruled.config, config_dict.tile_of(fitted))
            limit = f"{self.gpu.smem_per_block / _KIB:.0f} KiB"
            changes.append(f"fitted to {limit} of shared memory: {smaller}; the engine alone would end")
        return SafeEntry(fitted, "; ".join(changes) or None)

    def _refuse(self, why: str, shape: MoEShape, projection: Projection) -> RefusedEntry:
        warn_once(f"the engine's default runs for the {projection} projection of {shape}: {why}")
        return RefusedEntry(why)


def _write_back(entry: ConfigDict, written: TileConfig, config: TileConfig) -> ConfigDict:
    """A copy of the entry that says what `config` does; an entry that says so already keeps its form."""
    copy = dict(entry) if config.use_tma else config_dict.drop_tma(entry)
    has_floats = any(isinstance(copy.get(name), float) for name in config_table.FIELDS)
    is_same = replace(written, use_tma=config.use_tma) == config
    return copy if is_same and not has_floats else config_dict.resize(copy, config)


def describe_change(before: TileConfig, after: TileConfig, rule: LaunchRule) -> str:
    """What mending one rule changed, in the words of a table."""
    return next((it for it in _changes(before, after) if it.partition(" ")[0] in rule.name), rule.name)


def describe_changes(before: TileConfig, after: TileConfig) -> str:
    """All that is different, in the words of a table: `num_stages 5 -> 2`."""
    return ", ".join(_changes(before, after))


def _changes(before: TileConfig, after: TileConfig) -> list[str]:
    names = {ours: name for name, ours in config_table.FIELDS.items()} | {"use_tma": config_dict.USE_TMA}
    names |= {name: name for name in config_table.ROCM_OPTIONS}
    pairs = [(names[it.name], getattr(before, it.name), getattr(after, it.name)) for it in fields(TileConfig)]
    return [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]


def fit_to_shared_memory(entry: ConfigDict, shape: MoEShape, gpu: Gpu | None) -> ConfigDict:
    """The entry itself, or a smaller one if it asks for more shared memory than the GPU has a block."""
    config = config_dict.tile_of(entry)
    if gpu is None or (asked := smem_bytes(config, shape, gpu.target)) <= gpu.smem_per_block:
        return entry
    smaller = next((it for it in degrade(config) if smem_bytes(it, shape, gpu.target) <= gpu.smem_per_block), None)
    if smaller is None:
        return entry
    warn_once(
        f"{config} asks for {asked} B of shared memory for {shape}, {gpu.device_name} has {gpu.smem_per_block} B "
        f"a block: runs {smaller} instead"
    )
    return config_dict.resize(entry, smaller)


@functools.lru_cache(maxsize=4096)
def warn_once(text: str) -> None:
    """Write one line to the server's log, however often it is true."""
    log.warning("sglang-moe-ext: %s", show(text, 600))
