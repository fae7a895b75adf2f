"""One entry of the engine's tables, a dict as its lookup returns it, and the configuration that it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_moe_ext.core import Target, TileConfig
from sglang_moe_ext.kernel_plans import Plan
from sglang_moe_ext.tables.config_table import FIELDS, ROCM_OPTIONS, rocm_options

ConfigDict = dict[str, Any]

USE_TMA = "USE_TMA"
# What Triton takes where an entry names no warps or stages, as the engine's bf16 default does not.
_TRITON_WARPS, _TRITON_STAGES = 4, 3
TRITON_STAGES_ON_AMD = 2


def tile_of(entry: Mapping[str, Any]) -> TileConfig:
    """The configuration that an entry means. Raises KeyError where it names no tile."""
    return TileConfig(
        block_m=entry["BLOCK_SIZE_M"],
        block_n=entry["BLOCK_SIZE_N"],
        block_k=entry["BLOCK_SIZE_K"],
        group_m=entry["GROUP_SIZE_M"],
        num_warps=entry.get("num_warps", _TRITON_WARPS),
        num_stages=entry.get("num_stages", _TRITON_STAGES),
        use_tma=bool(entry.get(USE_TMA, False)),
        **{name: entry.get(name, default) for name, default in ROCM_OPTIONS.items()},
    )


def launch_args(config: TileConfig) -> ConfigDict:
    """What the kernel takes of a configuration: all but USE_TMA."""
    return {name: getattr(config, ours) for name, ours in FIELDS.items()} | rocm_options(config)


def config_dict_of(config: TileConfig) -> ConfigDict:
    """A fresh entry, as a table has it: the engine takes USE_TMA out of what its lookup returns."""
    return launch_args(config) | ({USE_TMA: True} if config.use_tma else {})


def resize(entry: Mapping[str, Any], config: TileConfig) -> ConfigDict:
    """The entry with the tile and stages of that configuration; all else that it says stays."""
    return {**entry, **launch_args(config)}


def for_target(entry: Mapping[str, Any], target: Target) -> ConfigDict:
    """A copy as Triton takes it there: without options that it has for AMD GPUs alone, or with its stages on these."""
    if target.is_amd:
        return {"num_stages": TRITON_STAGES_ON_AMD, **entry}
    return {name: value for name, value in entry.items() if name not in ROCM_OPTIONS}


def drop_tma(entry: Mapping[str, Any]) -> ConfigDict:
    """A copy that does not ask for TMA."""
    return {name: value for name, value in entry.items() if name != USE_TMA}


class ConfigWithPlan(ConfigDict):
    """An entry of the down GEMM that carries our kernel plan along.

    The engine hands it from its lookup to its sequence of kernels as it is; its copies, and the engine's own kernels,
    know the entry alone.
    """

    def __init__(self, entry: Mapping[str, Any], plan: Plan) -> None:
        super().__init__(entry)
        self.plan = plan
