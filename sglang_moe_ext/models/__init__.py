"""From a model's name, its config.json or a line of text to the shape of its experts."""

from sglang_moe_ext.models.builtin import builtin_models
from sglang_moe_ext.models.hf_config import from_config
from sglang_moe_ext.models.quantization import quantization_from_config
from sglang_moe_ext.models.resolve import resolve
from sglang_moe_ext.models.shape_string import parse_dtype_flag, parse_shape

__all__ = [
    "builtin_models",
    "from_config",
    "parse_dtype_flag",
    "parse_shape",
    "quantization_from_config",
    "resolve",
]
