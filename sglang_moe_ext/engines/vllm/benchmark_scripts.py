"""Complete `get_model_params` of vLLM's benchmark_moe.py for the architectures that it does not name.

The script is benchmarks/kernels/benchmark_moe.py in vLLM's source tree, and in no wheel. Its function compares the
architecture with names and takes any other for a Mixtral: that raises, or answers the width of the dense layers.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from sglang_moe_ext.core import ModelError
from sglang_moe_ext.engines.copied_functions import in_one_line, names_architectures, strings_of
from sglang_moe_ext.models.config_fields import CONFIG_CLASS_ERRORS
from sglang_moe_ext.models.hf_config import from_config

log = logging.getLogger(__name__)

GetModelParams = Callable[..., tuple[int, int, int, int]]
_DEFAULT = "MixtralForCausalLM"
"""The architecture that upstream answers for without naming it."""
_MEANINGS = ("experts", "top-k", "expert width", "hidden size")


def patch(upstream: GetModelParams) -> GetModelParams:
    """`upstream`, completed. It answers itself for the architectures that it names, and its errors stay its own."""
    stated = strings_of(upstream)
    if not names_architectures(stated):
        return upstream

    @functools.wraps(upstream)
    def get_model_params(config: Any, *args: Any, **kwargs: Any) -> tuple[int, int, int, int]:
        ours = _answer_unless_stated(stated, config)
        if ours is None:
            return upstream(config, *args, **kwargs)
        try:
            theirs = upstream(config, *args, **kwargs)
        except CONFIG_CLASS_ERRORS as error:  # an architecture that it does not name
            log.warning("%s; get_model_params raised %s", _said(ours), in_one_line(error))
            return ours
        if theirs != ours:
            log.warning("%s; get_model_params took it for a Mixtral: %s", _said(ours), theirs)
        return ours

    return get_model_params


def _answer_unless_stated(stated: frozenset[str], config: Any) -> tuple[int, int, int, int] | None:
    """None where the answer is upstream's to give: it names the architecture, or there is no other answer."""
    try:
        model = from_config(config, name="the model", source="the config of benchmark_moe.py")
    except ModelError as error:
        log.warning("sglang-moe-ext leaves get_model_params to upstream: %s", error)
        return None
    if model.architecture in (*stated, _DEFAULT):
        return None
    return model.routed_experts, model.top_k, model.intermediate_size, model.hidden_size


def _said(ours: tuple[int, int, int, int]) -> str:
    sizes = ", ".join(f"{meaning} {size}" for meaning, size in zip(_MEANINGS, ours, strict=True))
    return f"sglang-moe-ext answers for this architecture: {sizes}"
