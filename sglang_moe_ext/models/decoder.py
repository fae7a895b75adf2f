"""Read what stands around the experts in a decoder layer off a config: attention, dense MLPs, shared experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sglang_moe_ext.core import DecoderShape, MoEModel
from sglang_moe_ext.models.config_fields import LARGEST, Section, read_field
from sglang_moe_ext.models.field_spellings import SHARED_WIDTH
from sglang_moe_ext.models.hf_config import locate_experts

_OTHER_ATTENTION = (
    "attention_other",
    "attn_type",
    "chunk",
    "compress",
    "conv_",
    "global_",
    "hybrid",
    "index_",
    "interleav",
    "layers_block_type",
    "lightning",
    "linear_",
    "mamba",
    "share_q",
    "sliding_window_pattern",
    "sparse_att",
    "ssm",
    "swa_",
)
"""Parts of the names of fields by which a config states attention of another kind, in some layers or in all."""
_NO_ATTENTION = ("linear_bias", "interleave_moe_layer_step")
"""Fields that have such a part and say nothing of attention."""
_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_decoder(config: Section, model: MoEModel) -> DecoderShape | None:
    """None where the config does not state it, or states attention that is neither softmax nor latent (MLA).

    Figures for an estimate: a wrong value in the config makes them wrong, and raises nothing.
    """
    experts = locate_experts(config)
    if experts is None:
        return None
    section = experts.section
    layers, heads = _size(section, "num_hidden_layers", "num_layers"), _size(section, "num_attention_heads")
    hidden_size = _size(section, "hidden_size")
    if layers is None or heads is None or hidden_size is None or _has_other_attention(section):
        return None
    windows = _windows(section, layers)
    if windows is None:
        return None
    has_dense = (model.moe_layers or layers) < layers
    stated = experts.first(SHARED_WIDTH)
    shared = stated[1] if stated is not None and type(stated[1]) is int and 0 <= stated[1] <= LARGEST else None
    latent, rope = _size(section, "kv_lora_rank"), _size(section, "qk_rope_head_dim") or 0
    query = (_size(section, "qk_nope_head_dim") or 0) + rope if latent else 0
    query_dim = query or _size(section, "head_dim") or max(1, hidden_size // heads)
    return DecoderShape(
        layers=layers,
        hidden_size=hidden_size,
        heads=heads,
        kv_heads=_size(section, "num_key_value_heads") or heads,
        query_dim=query_dim,
        value_dim=_size(section, "v_head_dim") or query_dim,
        latent_dim=latent or 0,
        query_rank=(_size(section, "q_lora_rank") or 0) if latent else 0,
        rope_dim=rope if latent else 0,
        dense_width=(_size(section, "intermediate_size") or 0) if has_dense else 0,
        shared_width=model.shared_experts * model.intermediate_size if shared is None else shared,
        windowed_layers=windows[0],
        window=windows[1],
    )


def _size(section: Section, *names: str) -> int | None:
    values = (read_field(section, name) for name in names)
    return next((value for value in values if type(value) is int and 1 <= value <= LARGEST), None)


def _names(section: Section) -> Iterator[str]:
    fields = section if isinstance(section, Mapping) else getattr(section, "__dict__", {})
    yield from (name for name in fields if isinstance(name, str))


def _has_other_attention(section: Section) -> bool:
    suspect = (name for name in _names(section) if any(part in name for part in _OTHER_ATTENTION))
    return any(_says_something(read_field(section, name)) for name in suspect if name not in _NO_ATTENTION)


def _says_something(value: object) -> bool:
    """False for nothing, and for MiniMax's list of layers that all have softmax attention."""
    is_all_ones = isinstance(value, (list, tuple)) and all(type(kind) is int and kind == 1 for kind in value)
    return bool(value) and not is_all_ones


def _windows(section: Section, layers: int) -> tuple[int, int] | None:
    """(Layers with a sliding window, the window); None where layers are of a kind that is not known."""
    window = _size(section, "sliding_window")
    kinds = read_field(section, "layer_types")
    if isinstance(kinds, (list, tuple)) and kinds:
        if len(kinds) != layers or any(kind not in (_SLIDING, _FULL) for kind in kinds):
            return None
        sliding = sum(kind == _SLIDING for kind in kinds)
        return (sliding, window or 0) if window or not sliding else None
    is_on = window is not None and read_field(section, "use_sliding_window") is not False
    return (layers, window or 0) if is_on else (0, 0)
