"""From a model's name, its config.json or a line of text to the shape of its experts."""

from sglang_moe_ext.shapes.builtin import builtin_models
from sglang_moe_ext.shapes.config import from_config
from sglang_moe_ext.shapes.quantisation import quantisation_from_config
from sglang_moe_ext.shapes.resolve import resolve
from sglang_moe_ext.shapes.stated import parse_dtype_flag, parse_shape

__all__ = [
    "builtin_models",
    "from_config",
    "parse_dtype_flag",
    "parse_shape",
    "quantisation_from_config",
    "resolve",
]
