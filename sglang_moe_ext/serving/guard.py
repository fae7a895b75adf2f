"""What keeps a configuration from ending or corrupting a server: shared memory that is there, TMA where it is right."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sglang_moe_ext.core import Gpu, MoEShape, Projection, TileConfig
from sglang_moe_ext.engines import config_dict, running
from sglang_moe_ext.engines.config_dict import ConfigDict
from sglang_moe_ext.engines.sglang import support
from sglang_moe_ext.gpu.shared_memory import smem_bytes

log = logging.getLogger(__name__)

_FEWEST_STAGES, _SMALLEST_SIDE = 2, 32


def degrade(config: TileConfig) -> Iterator[TileConfig]:
    """Ever smaller ones: fewer stages, then a narrower N, then a shorter K, last one stage.

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
class ConfigGuard:
    """The rules of one SGLang on one GPU; without a GPU that is known, only a launch tells what fits."""

    version: tuple[int, int, int]
    gpu: Gpu | None

    def safe(self, entry: ConfigDict, shape: MoEShape, projection: Projection) -> ConfigDict:
        """A fresh entry that this GPU can run and that computes what it should; most often a plain copy."""
        return fit_to_shared_memory(self._right(entry, shape, projection), shape, self.gpu)

    def _right(self, entry: ConfigDict, shape: MoEShape, projection: Projection) -> ConfigDict:
        if entry.get(config_dict.USE_TMA):
            if support.is_right(projection, shape.quantization, self.version):
                return dict(entry)
            warn_once(
                f"USE_TMA of the {projection} projection is off for {shape}: "
                "this SGLang would end or compute wrong results with it"
            )
        return config_dict.drop_tma(entry)


def fit_to_shared_memory(entry: ConfigDict, shape: MoEShape, gpu: Gpu | None) -> ConfigDict:
    """The entry, or a smaller one where that asks for more shared memory than the GPU has a block."""
    config = config_dict.tile_of(entry)
    if gpu is None or (asked := smem_bytes(config, shape, gpu.sm)) <= gpu.smem_per_block:
        return entry
    smaller = next((it for it in degrade(config) if smem_bytes(it, shape, gpu.sm) <= gpu.smem_per_block), None)
    if smaller is None:
        return entry
    warn_once(
        f"{config} asks for {asked} B of shared memory for {shape}, {gpu.device_name} has {gpu.smem_per_block} B "
        f"a block: runs {smaller} instead"
    )
    return config_dict.resize(entry, smaller)


@functools.lru_cache(maxsize=4096)
def warn_once(text: str) -> None:
    """One line in the server's log, however often it is true."""
    log.warning("sglang-moe-ext: %s", text)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class GuardedLauncher:
    """An engine's function that launches one GEMM of a layer, as its callers call it: A, B, ... config, ...

    `override` is the configuration of the engine's `override_config`, None where none is in force. `fitted` says before
    the first launch of a kind which smaller entry runs in the place of the one that is asked for, if one must.
    """

    function: Callable[..., Any]
    config_position: int
    override: Callable[[], object]
    fitted: Callable[[tuple[Any, ...], dict[str, Any]], ConfigDict | None] | None = None


def launch_hook(launcher: GuardedLauncher) -> Callable[..., Any]:
    """A function to stand where the launcher stood: what Triton refuses runs smaller, from then on for its shape.

    Triton refuses before it launches anything, so a second try finds all tensors as they were. What torch.compile
    traces, as it does the attention of vLLM's K2 Horizon, is the engine's own launch: a graph has no place for ours.
    """
    original, position, is_traced = launcher.function, launcher.config_position, running.is_traced()
    known: dict[Any, ConfigDict | None] = {}

    @functools.wraps(original)
    def launched(*args: Any, **kwargs: Any) -> Any:
        if is_traced():
            return original(*args, **kwargs)
        once, named = args, kwargs
        if (known or launcher.fitted) and (entry := _known(known, launcher, args, kwargs)) is not None:
            once, named = _with_config(position, args, kwargs, entry)
        try:
            return original(*once, **named)
        except Exception as error:
            if not running.is_out_of_resources(error) or launcher.override():
                raise
            entry, result = _smaller(launcher, once, named, error)
            known[_key(position, args, kwargs)] = entry
            return result

    return launched


def _config(position: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    config: Mapping[str, Any] = args[position] if len(args) > position else kwargs["config"]
    return config


def _with_config(position: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], entry: ConfigDict) -> Arguments:
    if len(args) > position:
        return (*args[:position], dict(entry), *args[position + 1 :]), dict(kwargs)
    return args, {**kwargs, "config": dict(entry)}


def _key(position: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The configuration, and the weights that it is launched for: what decides how much memory it asks for."""
    weights = args[1] if len(args) > 1 else kwargs["B"]
    hidden = args[0] if args else kwargs["A"]
    uses_tma = kwargs.get("a_use_tma"), kwargs.get("b_use_tma")
    return tuple(_config(position, args, kwargs).items()), tuple(weights.shape), weights.dtype, hidden.dtype, uses_tma


def _known(
    known: dict[Any, ConfigDict | None], launcher: GuardedLauncher, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ConfigDict | None:
    if launcher.override():
        return None
    try:
        key = _key(launcher.config_position, args, kwargs)
        if launcher.fitted is None or key in known:
            return known.get(key)
    except (TypeError, KeyError, AttributeError):  # called in a way that is not the engine's
        return None
    try:
        known[key] = launcher.fitted(args, kwargs)
    except Exception as error:  # whatever is broken here, the launch itself tells what fits
        warn_once(f"a launch is not looked at before it runs: {type(error).__name__}: {error}")
        known[key] = None
    return known[key]


def _smaller(
    launcher: GuardedLauncher, args: tuple[Any, ...], kwargs: Mapping[str, Any], refused: Exception
) -> tuple[ConfigDict, Any]:
    """The first smaller entry that Triton does not refuse, and what the launch with it returned.

    Raises:
        Exception: `refused`, where Triton refuses all of them.
    """
    entry = _config(launcher.config_position, args, kwargs)
    if "BLOCK_SIZE_N" not in entry:  # vLLM's launcher for groups along K chooses a tile itself
        raise refused
    asked = config_dict.tile_of(entry)
    for config in degrade(asked):
        smaller = config_dict.resize(entry, config)
        try:
            once_more, named = _with_config(launcher.config_position, args, kwargs, smaller)
            result = launcher.function(*once_more, **named)
        except Exception as error:
            if not running.is_out_of_resources(error):
                raise
            continue
        warn_once(f"{asked} does not fit this GPU ({refused}): runs {config} instead; tune this model on this GPU")
        return smaller, result
    raise refused
