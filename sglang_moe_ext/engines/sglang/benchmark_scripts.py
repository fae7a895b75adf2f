"""Complete `get_model_config` of SGLang's benchmark scripts for the architectures that it does not name.

The scripts are benchmark/kernels/fused_moe_triton in SGLang's source tree, and in no wheel. Their function compares
the architecture with names and takes any other for a Mixtral: that raises, or answers the width of the dense layers
where transformers 5 gives a config the attributes of a Mixtral's.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from sglang_moe_ext.core import ModelError, Parallelism
from sglang_moe_ext.engines.copied_functions import in_one_line, names_architectures, strings_of
from sglang_moe_ext.engines.sglang import installation
from sglang_moe_ext.engines.sglang.sharding import NEWEST, launched_shape
from sglang_moe_ext.models.config_fields import read_field
from sglang_moe_ext.models.hf_config import locate_experts
from sglang_moe_ext.models.resolve import config_of_class, resolve

log = logging.getLogger(__name__)

GetModelConfig = Callable[..., dict[str, Any]]

SIZES = ("num_experts", "topk", "hidden_size", "shard_intermediate_size")
"""The keys that upstream reads off the architecture; it reads the others alike for every model."""
LAYERS = {"num_layers": "num_hidden_layers", "dense_layers": "first_k_dense_replace"}
"""Keys of newer versions, and the fields they come from; upstream says 0 where a config has no such field."""
_DEFAULT = "MixtralForCausalLM"
"""The architecture that upstream answers for without naming it."""


def patch(upstream: GetModelConfig) -> GetModelConfig:
    """`upstream`, completed. It answers itself for the architectures that it names, and its errors stay its own."""
    stated = strings_of(upstream)
    if not names_architectures(stated):
        log.warning("sglang-moe-ext leaves get_model_config as it is: no architecture is named in it")
        return upstream

    @functools.wraps(upstream)
    def get_model_config(*args: Any, **kwargs: Any) -> dict[str, Any]:
        ours = _answer_unless_stated(stated, upstream, args, kwargs)
        if ours is None:
            return upstream(*args, **kwargs)
        try:
            theirs = upstream(*args, **kwargs)
        except Exception as error:  # an architecture that it does not name can trip it anywhere
            log.warning("%s; get_model_config raised %s", _said(ours), in_one_line(error))
            return ours
        return _corrected(theirs, ours)

    return get_model_config


def _answer_unless_stated(
    stated: frozenset[str], upstream: GetModelConfig, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """None where the answer is upstream's to give: it names the architecture, or there is no other answer."""
    try:
        asked = inspect.signature(upstream).bind(*args, **kwargs).arguments
        return _answer(stated, asked)
    except Exception as error:  # a fault of ours must not stop a script of upstream's
        log.warning("sglang-moe-ext leaves get_model_config to upstream: %s", in_one_line(error))
        return None


def _answer(stated: frozenset[str], asked: dict[str, Any]) -> dict[str, Any] | None:
    import torch

    model = resolve(asked["model_name"])
    if model.architecture in (*stated, _DEFAULT):
        return None
    engine = installation.find()
    shape = launched_shape(
        model,
        Parallelism(asked["tp_size"], asked.get("ep_size", 1)),
        engine_version=NEWEST if engine is None else engine.version,
        fuse_shared_experts=not asked.get("disable_shared_experts_fusion", False),
    )
    block_shape = shape.quantization.block_shape
    # Upstream counts a fused shared expert among the top-k only of ids that were recorded from a server.
    uncounted = shape.fused_shared if asked.get("topk_ids_dir") is None else 0
    # Also for experts without a gate: upstream takes half of it for the N of a table's name, whatever the model.
    shard_intermediate_size = 2 * shape.intermediate_size
    return {
        "num_experts": shape.experts,
        "topk": shape.top_k - uncounted,
        "hidden_size": shape.hidden_size,
        "shard_intermediate_size": shard_intermediate_size,
        "dtype": getattr(torch, shape.dtype),
        "block_shape": None if block_shape is None else list(block_shape),
        "architecture": model.architecture,
        **_layers(asked["model_name"], stated),
    }


def _layers(model_name: str, stated: frozenset[str]) -> dict[str, int]:
    """The keys of LAYERS that this version of upstream has."""
    wanted = [key for key in LAYERS if key in stated]
    try:
        config = config_of_class(model_name, trust_remote_code=False) if wanted else None
    except ModelError:
        config = None
    experts = locate_experts(config)
    section = config if experts is None else experts.section
    counts = {key: read_field(section, LAYERS[key]) for key in wanted}
    return {key: count if isinstance(count, int) else 0 for key, count in counts.items()}


def _corrected(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Upstream's answer with our sizes where they differ; the rest stays in the layout of its version."""
    if not isinstance(theirs, dict):
        return theirs
    wrong = {key: theirs[key] for key in SIZES if key in theirs and theirs[key] != ours[key]}
    if not wrong:
        return theirs
    told = ", ".join(f"{key} {value}" for key, value in wrong.items())
    log.warning("%s; get_model_config took it for a Mixtral with %s", _said(ours), told)
    return {**theirs, **{key: ours[key] for key in wrong}}


def _said(ours: dict[str, Any]) -> str:
    sizes = ", ".join(f"{key} {ours[key]}" for key in SIZES)
    return f"sglang-moe-ext answers for {ours['architecture']}: {sizes}"
