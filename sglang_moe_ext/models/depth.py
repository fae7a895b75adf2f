"""Count the MoE layers of a model, as far as its config tells."""

from __future__ import annotations

from collections.abc import Mapping

from sglang_moe_ext.models.config_fields import Section, read_field
from sglang_moe_ext.models.hf_config import locate_experts

_LISTS: dict[str, tuple[object, ...]] = {
    "hybrid_override_pattern": ("E",),
    "layers_block_type": ("moe",),
    "mlp_layer_types": ("sparse", "moe"),
    "moe_layer_freq": (1, True),
}
"""Fields that list the layers, and the values of those with experts."""
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers")
_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_PERIODS = ("decoder_sparse_step", "interleave_moe_layer_step", "expert_layer_period")
_MOST_LAYERS = 10_000


def count_moe_layers(config: Section) -> int | None:
    """The number of layers with experts; None where the config does not tell it.

    A number for information: a wrong value in the config makes it wrong, and raises nothing.
    """
    experts = locate_experts(config)
    if experts is None:
        return None
    section = experts.section
    blocks = read_field(section, "block_configs")
    if isinstance(blocks, (list, tuple)):
        return sum(isinstance(block, Mapping) and block.get("block_type") == "moe" for block in blocks) or None
    for name, kinds in _LISTS.items():
        layers = read_field(section, name)
        if isinstance(layers, (list, tuple, str)):
            return sum(layer in kinds for layer in layers) or None
    depth = _number(section, _DEPTHS)
    if depth is None:
        return None
    skipped = read_field(section, "mlp_only_layers")
    dense = _number(section, _DENSE_FIRST) or (len(skipped) if isinstance(skipped, (list, tuple)) else 0)
    return max(depth - dense, 0) // max(_number(section, _PERIODS) or 1, 1) or None


def _number(section: Section, names: tuple[str, ...]) -> int | None:
    values = (read_field(section, name) for name in names)
    return next((value for value in values if type(value) is int and 0 <= value <= _MOST_LAYERS), None)
