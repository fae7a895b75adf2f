"""How the weights are stored: every method of a checkpoint, and what --dtype makes of it."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_moe_ext.core import ModelError, Quantization
from sglang_moe_ext.models.quantization import METHODS, OTHER_KERNELS, quantization_from_config
from sglang_moe_ext.models.shape_string import parse_dtype_flag
from tests.examples import examples

FP8_TENSOR = Quantization("fp8_w8a8")
FP8_CHANNEL = Quantization("fp8_w8a8", per_channel=True)
FP8_BLOCK = Quantization("fp8_w8a8", (128, 128))


def stored(**section: Any) -> Quantization:
    return quantization_from_config({"quantization_config": section})


def refusal(**section: Any) -> str:
    with pytest.raises(ModelError) as refused:
        stored(**section)
    message = str(refused.value)
    assert message.isprintable()
    return message


def group(
    kind: str, bits: int, strategy: str | None, activation_bits: int | None = None, **weights: Any
) -> dict[str, Any]:
    activations = None if activation_bits is None else {"type": kind, "num_bits": activation_bits}
    return {
        "targets": ["Linear"],
        "weights": {"type": kind, "num_bits": bits, "strategy": strategy} | weights,
        "input_activations": activations,
    }


def compressed(*groups: dict[str, Any], **others: Any) -> dict[str, Any]:
    named = {f"group_{at}": one for at, one in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": named} | others


METHOD_CASES: dict[str, tuple[dict[str, Any], Quantization]] = {
    "fp8 with blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, FP8_BLOCK),
    "fp8 without blocks": ({"quant_method": "fp8", "activation_scheme": "static"}, FP8_TENSOR),
    "fp8 with blocks of nothing": ({"quant_method": "fp8", "weight_block_size": [0, None]}, FP8_TENSOR),
    "w8a8_fp8": ({"quant_method": "w8a8_fp8"}, FP8_CHANNEL),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, FP8_CHANNEL),
    "w8a8_int8": ({"quant_method": "w8a8_int8"}, Quantization("int8_w8a8", per_channel=True)),
    "blockwise_int8": (
        {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]},
        Quantization("int8_w8a8", (128, 128)),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, Quantization("int4_w4a16", (0, 128))),
    "awq in AutoAWQ's words": (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64},
        Quantization("int4_w4a16", (0, 64)),
    ),
    "gptq in 4 bits": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, Quantization("int4_w4a16", (0, 32))),
    "gptq in 8 bits without groups": (
        {"quant_method": "gptq", "bits": 8, "group_size": -1},
        Quantization("int8_w8a16", per_channel=True),
    ),
    "compressed fp8 per channel": (compressed(group("float", 8, "channel", 8)), FP8_CHANNEL),
    "compressed fp8 per tensor": (compressed(group("float", 8, "tensor", 8)), FP8_TENSOR),
    "compressed fp8 in blocks": (compressed(group("float", 8, "block", 8, block_structure=[128, 128])), FP8_BLOCK),
    "compressed fp8 in blocks, spelled out": (
        compressed(group("float", 8, "block", 8, block_structure="128x128")),
        FP8_BLOCK,
    ),
    "compressed int8": (compressed(group("int", 8, "channel", 8)), Quantization("int8_w8a8", per_channel=True)),
    "compressed int4 in groups": (
        compressed(group("int", 4, "group", group_size=32)),
        Quantization("int4_w4a16", (0, 32)),
    ),
    "compressed int8 weights alone": (
        compressed(group("int", 8, "group", group_size=128)),
        Quantization("int8_w8a16", (0, 128)),
    ),
    "compressed int4 per channel": (
        compressed(group("int", 4, "channel")),
        Quantization("int4_w4a16", per_channel=True),
    ),
    "compressed with a group for experts": (
        compressed(group("float", 8, "tensor", 8), group("float", 8, "channel", 8) | {"targets": ["re:.*experts.*"]}),
        FP8_CHANNEL,
    ),
    "compressed with nothing in it": (compressed(), Quantization()),
    "compressed with experts left out": (
        compressed(group("float", 8, "tensor", 8), ignore=["lm_head", "re:.*mlp.experts.*"]),
        Quantization(),
    ),
    "compressed with only shared experts left out": (
        compressed(group("float", 8, "tensor", 8), ignore=["re:.*shared_experts.*"]),
        FP8_TENSOR,
    ),
    "compressed with one layer's experts left out": (
        compressed(group("float", 8, "tensor", 8), ignore=["model.layers.0.mlp.experts"]),
        FP8_TENSOR,
    ),
    "compressed with all but the experts left out": (
        compressed(group("float", 8, "tensor", 8), ignore=["re:^(?!.*mlp.experts).*"]),
        FP8_TENSOR,
    ),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, FP8_TENSOR),
    "modelopt fp8 in a file of its own": (
        {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}},
        FP8_TENSOR,
    ),
    "modelopt fp8 per channel": ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, FP8_CHANNEL),
    "modelopt fp8 in blocks": ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, FP8_BLOCK),
    "modelopt mixed, with fp8 experts": (
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
        | {"quantized_layers": {"l.1.experts.0.up": {"quant_algo": "FP8"}, "l.1.q_proj": {"quant_algo": "NVFP4"}}},
        FP8_TENSOR,
    ),
    "modelopt mixed, with plain experts": (
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"q": {"quant_algo": "FP8"}}},
        Quantization(),
    ),
    "nothing": ({}, Quantization()),
}


@pytest.mark.parametrize(("section", "expected"), METHOD_CASES.values(), ids=METHOD_CASES.keys())
def test_a_method_is_read_as_the_engine_runs_it(section: dict[str, Any], expected: Quantization) -> None:
    assert stored(**section) == expected


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}], ids=["none stated", "null"])
def test_weights_without_a_section_are_not_quantized(config: dict[str, Any]) -> None:
    assert quantization_from_config(config) == Quantization()


@pytest.mark.parametrize(
    "config",
    [
        {"compression_config": {"quant_method": "fp8"}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        {"quantization_config": {}, "text_config": {"quantization_config": {"quant_method": "fp8"}}},
        SimpleNamespace(quantization_config={"quant_method": "fp8"}),
    ],
    ids=["compression_config", "in the text model", "in the text model under an empty one", "of an object"],
)
def test_the_section_is_found_wherever_it_stands(config: object) -> None:
    assert quantization_from_config(config) == FP8_TENSOR


def test_a_section_that_a_library_made_an_object_of_is_opened() -> None:
    class Method(str, Enum):
        FP8 = "fp8"

    section = SimpleNamespace(to_dict=lambda: {"quant_method": Method.FP8, "weight_block_size": (128, 128)})

    assert quantization_from_config({"quantization_config": section}) == FP8_BLOCK


@pytest.mark.parametrize("method", OTHER_KERNELS)
def test_experts_of_another_kernel_are_refused_by_the_name_of_their_method(method: str) -> None:
    message = refusal(quant_method=method)

    assert method in message
    assert "JSON tables" in message


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    "compressed mxfp4": (
        compressed(group("float", 4, "group", group_size=32) | {"format": "mxfp4-pack-quantized"}),
        "mxfp4",
    ),
    "compressed nvfp4": (compressed(group("float", 4, "tensor_group", 4)), "'float' weights of 4 bits"),
    "compressed fp8 weights alone": (compressed(group("float", 8, "channel")), "'float' weights of 8 bits"),
    "compressed int4 with int8 activations": (compressed(group("int", 4, "group", 8, group_size=32)), "4 bits"),
    "compressed fp8 in groups": (compressed(group("float", 8, "group", 8, group_size=32)), "strategy 'group'"),
}


@pytest.mark.parametrize(("section", "named"), OTHERS.values(), ids=OTHERS.keys())
def test_a_layout_of_another_kernel_is_refused_and_named(section: dict[str, Any], named: str) -> None:
    message = refusal(**section)

    assert named in message
    assert "JSON tables" in message


def test_fp4_experts_in_an_fp8_checkpoint_are_refused() -> None:
    with pytest.raises(ModelError, match="fp4"):
        quantization_from_config({"expert_dtype": "fp4", "quantization_config": {"quant_method": "fp8"}})


MALFORMED: dict[str, dict[str, Any]] = {
    "an unknown method": {"quant_method": "quark"},
    "a method that is no name": {"quant_method": 8},
    "no method": {"bits": 4},
    "gptq in 3 bits": {"quant_method": "gptq", "bits": 3, "group_size": 128},
    "gptq without bits": {"quant_method": "gptq", "group_size": 128},
    "a group of nothing": {"quant_method": "gptq", "bits": 4, "group_size": 0},
    "a group in words": {"quant_method": "gptq", "bits": 4, "group_size": "128"},
    "half a block": {"quant_method": "fp8", "weight_block_size": [128]},
    "half a block of nothing": {"quant_method": "fp8", "weight_block_size": [128, None]},
    "a block that is one number": {"quant_method": "fp8", "weight_block_size": 128},
    "groups that are a list": {"quant_method": "compressed-tensors", "config_groups": [1]},
    "groups that are numbers": {"quant_method": "compressed-tensors", "config_groups": {"group_0": 8}},
    "a block strategy without a block": compressed(group("float", 8, "block", 8)),
    "two layouts for linear layers": compressed(group("float", 8, "tensor", 8), group("float", 8, "channel", 8)),
    "modelopt with experts of two kinds": {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            "l.1.experts": {"quant_algo": "FP8"},
            "l.2.experts": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        },
    },
}


@pytest.mark.parametrize("section", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_section_is_refused_in_one_line(section: dict[str, Any]) -> None:
    refusal(**section)


def test_a_section_that_is_no_object_is_refused() -> None:
    with pytest.raises(ModelError, match="expected an object"):
        quantization_from_config({"quantization_config": "fp8"})


KEYS = (
    "quant_method",
    "config_groups",
    "weights",
    "input_activations",
    "targets",
    "type",
    "num_bits",
    "strategy",
    "group_size",
    "bits",
    "weight_block_size",
    "block_structure",
    "quant_algo",
    "quantization",
    "quantized_layers",
    "ignore",
    "a.experts",
)
WORDS = (
    *METHODS,
    "float",
    "int",
    "channel",
    "group",
    "block",
    "FP8",
    "MIXED_PRECISION",
    "experts",
    "Linear",
    "1x",
    "²x1",
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 300), st.floats(), st.sampled_from(WORDS)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)),
    max_leaves=20,
)


@settings(max_examples=examples(200))
@given(method=st.sampled_from((*METHODS, None)), section=st.dictionaries(st.sampled_from(KEYS), values, max_size=8))
def test_any_section_is_read_or_refused_in_one_line(method: str | None, section: dict[str, Any]) -> None:
    try:
        stored(**section | ({"quant_method": method} if method else {}))
    except ModelError as refused:
        assert str(refused).isprintable()


FLAGS: dict[str, tuple[str | None, dict[str, Any], Quantization]] = {
    "auto is the checkpoint's": ("auto", {"checkpoint": FP8_BLOCK}, FP8_BLOCK),
    "none is the checkpoint's": (None, {"checkpoint": FP8_BLOCK}, FP8_BLOCK),
    "auto of nothing": ("auto", {}, Quantization()),
    "the same scheme keeps the checkpoint's blocks": ("fp8_w8a8", {"checkpoint": FP8_BLOCK}, FP8_BLOCK),
    "another scheme does not": ("int8_w8a8", {"checkpoint": FP8_BLOCK}, Quantization("int8_w8a8")),
    "fp8": ("fp8_w8a8", {}, FP8_TENSOR),
    "fp8 per channel": ("fp8_w8a8", {"per_channel": True}, FP8_CHANNEL),
    "per channel where the checkpoint has blocks": (
        "fp8_w8a8",
        {"per_channel": True, "checkpoint": FP8_BLOCK},
        FP8_CHANNEL,
    ),
    "fp8 in blocks": ("fp8_w8a8", {"block_shape": [128, 128]}, FP8_BLOCK),
    "int4 in groups": ("int4_w4a16", {"block_shape": [0, 32]}, Quantization("int4_w4a16", (0, 32))),
    "int8 weights": ("int8_w8a16", {}, Quantization("int8_w8a16")),
    "unquantized, whatever the checkpoint": ("bf16", {"checkpoint": FP8_BLOCK}, Quantization()),
    "in capitals": (" FP8_W8A8 ", {}, FP8_TENSOR),
}


@pytest.mark.parametrize(("flag", "others", "expected"), FLAGS.values(), ids=FLAGS.keys())
def test_the_dtype_flag_means(flag: str | None, others: dict[str, Any], expected: Quantization) -> None:
    assert parse_dtype_flag(flag, **others) == expected


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "an unknown dtype": ("fp4", {}),
    "channels and blocks": ("fp8_w8a8", {"per_channel": True, "block_shape": [128, 128]}),
    "channels of nothing": ("auto", {"per_channel": True}),
    "blocks of nothing": ("bf16", {"block_shape": [128, 128]}),
    "fp8 in groups": ("fp8_w8a8", {"block_shape": [0, 128]}),
    "int4 in blocks": ("int4_w4a16", {"block_shape": [128, 128]}),
    "half a block": ("fp8_w8a8", {"block_shape": [128]}),
    "a block of nothing": ("fp8_w8a8", {"block_shape": [128, 0]}),
}


@pytest.mark.parametrize(("flag", "others"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_flags_that_contradict_each_other_are_refused(flag: str, others: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as refused:
        parse_dtype_flag(flag, **others)
    assert str(refused.value).isprintable()
