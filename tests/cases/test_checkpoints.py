"""Checkpoints of public reports: how their experts are stored, held against the engines' own functions."""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.core import ModelError, MoEModel, MoEShape, Parallelism, Quantization
from sglang_moe_ext.engines.sglang import sharding as sglang
from sglang_moe_ext.engines.sglang import table_names
from sglang_moe_ext.engines.vllm import sharding as vllm
from sglang_moe_ext.models import from_config, resolve
from tests.engines.installed import run_in_engine

CASES = Path(__file__).parents[1] / "data" / "cases"
CHILD = Path(__file__).parents[1] / "engines" / "children" / "checkpoint_layers.py"
LAYERS, EXPERTS, PROJECTIONS = 4, 8, ("gate_proj", "up_proj", "down_proj")
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "torch_dtype": "bfloat16",
}


def modules(pattern: str, layers: range = range(LAYERS), experts: range = range(EXPERTS)) -> list[str]:
    """The pattern for each layer, expert and projection that it names."""
    return list(
        dict.fromkeys(
            pattern.format(layer=layer, expert=expert, projection=projection)
            for layer in layers
            for expert in experts
            for projection in PROJECTIONS
        )
    )


def weights(kind: str, bits: int, strategy: str, group: int | None = None) -> dict[str, Any]:
    return {"type": kind, "num_bits": bits, "strategy": strategy, "group_size": group, "symmetric": True}


def compressed(ignore: list[str], **groups: dict[str, Any]) -> dict[str, Any]:
    fp8 = {
        "targets": ["Linear"],
        "weights": weights("float", 8, "channel"),
        "input_activations": {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True},
    }
    stated = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ignore}
    return stated | {"config_groups": groups or {"group_0": fp8}}


def int4(targets: list[str], bits: int = 4, group: int = 64) -> dict[str, Any]:
    stored = weights("int", bits, "group", group)
    return {"targets": targets, "weights": stored, "input_activations": None, "format": "pack-quantized"}


def fp8(*ignored: str) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": list(ignored)}


def awq(*ignored: str) -> dict[str, Any]:
    stored = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    return stored | {"modules_to_not_convert": list(ignored)}


def auto_round(**others: Any) -> dict[str, Any]:
    return {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int"} | others


def modelopt(*ignored: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": list(ignored)}


CHILD_OF_EXPERT = "model.layers.{layer}.mlp.experts.{expert}.{projection}"
SECTIONS: dict[str, dict[str, Any]] = {
    "compressed, every expert by name": compressed(modules(CHILD_OF_EXPERT)),
    "compressed, names without model": compressed(modules(CHILD_OF_EXPERT.removeprefix("model."))),
    "compressed, names of the first expert alone": compressed(modules(CHILD_OF_EXPERT, experts=range(1))),
    "compressed, names of all but the first expert": compressed(modules(CHILD_OF_EXPERT, experts=range(1, EXPERTS))),
    "compressed, one layer by name": compressed(modules(CHILD_OF_EXPERT, layers=range(1))),
    "compressed, all layers but one by name": compressed(modules(CHILD_OF_EXPERT, layers=range(1, LAYERS))),
    "compressed, one projection": compressed([name for name in modules(CHILD_OF_EXPERT) if name.endswith("gate_proj")]),
    "compressed, parents": compressed(modules("model.layers.{layer}.mlp.experts.{expert}")),
    "compressed, the module of experts": compressed(modules("model.layers.{layer}.mlp.experts")),
    "compressed, a pattern of all layers": compressed(["lm_head", "re:.*mlp.experts.*"]),
    "compressed, a pattern with the layers' numbers": compressed([r"re:.*layers\.(0|1|2|3)\.mlp\.experts\..*"]),
    "compressed, a pattern of one layer": compressed([r"re:.*\.layers\.3\..*"]),
    "compressed, a pattern of everything else": compressed([r"re:^(?!.*mlp\.experts).*"]),
    "compressed, the router": compressed(["re:.*mlp.gate$", "lm_head"]),
    "compressed, shared experts": compressed(["re:.*shared_expert.*"]),
    "compressed, a suffix": compressed(["down_proj", "gate_proj", "up_proj"]),
    "groups, experts of their own": compressed(
        [], a=compressed([])["config_groups"]["group_0"], b=int4([r"re:.*mlp\.experts.*"])
    ),
    "groups, halves of the layers": compressed(
        [], a=int4([r"re:.*layers\.[01]\..*"]), b=int4([r"re:.*layers\.[23]\..*"], bits=8, group=128)
    ),
    "groups, experts by name": compressed([], a=int4(["Linear"], group=128), b=int4(modules(CHILD_OF_EXPERT), bits=8)),
    "groups, the attention by name": compressed(
        [], a=int4(["Linear"]), b=int4([r"re:.*self_attn.*"], bits=8, group=128)
    ),
    "fp8, layers by prefix": fp8(*modules("model.layers.{layer}.")),
    "fp8, one layer by prefix": fp8("model.layers.0."),
    "fp8, a dotted path": fp8("mlp.experts"),
    "fp8, one word": fp8("experts"),
    "fp8, one expert of each layer": fp8(*modules("model.layers.{layer}.mlp.experts.5.up_proj")),
    "fp8, names without model": fp8(*modules("layers.{layer}.mlp.experts")),
    "fp8, the router and the head": fp8("mlp.gate", "lm_head", "model.layers.0.mlp.gate"),
    "fp8, a part of a word": fp8("mlp.expert", "exper"),
    "fp8, a pattern, which it does not know": fp8("re:.*mlp.experts.*"),
    "awq, a substring": awq("mlp.experts"),
    "awq, a part of a word": awq("exper"),
    "awq, layers by prefix": awq("model.layers.0.", "model.layers.92."),
    "awq, children": awq(*modules(CHILD_OF_EXPERT)),
    "auto-round, by name": auto_round(extra_config={name: {"bits": 16} for name in modules(CHILD_OF_EXPERT)}),
    "auto-round, by pattern": auto_round(extra_config={r".*mlp\.experts.*": {"bits": 8, "group_size": -1}}),
    "auto-round, the router": auto_round(
        extra_config={name: {"bits": 16} for name in modules("model.layers.{layer}.mlp.gate")}
    ),
    "auto-round, one layer": auto_round(
        extra_config={name: {"bits": 8} for name in modules(CHILD_OF_EXPERT, range(1))}
    ),
    "auto-round, blocks": auto_round(block_name_to_quantize="model.layers"),
    "auto-round, other blocks": auto_round(block_name_to_quantize=["model.vision"]),
    "modelopt, a star in front": modelopt("*mlp.experts*"),
    "modelopt, a star for the number": modelopt("model.layers.*.mlp.experts"),
    "modelopt, a draft": modelopt("mtp*", "lm_head"),
    "modelopt, a part of a path": modelopt("experts"),
    "modelopt, one layer": modelopt("model.layers.0*"),
}
RELEASES = ("0.5.12", "0.5.15", "0.5.18", "0.5.23")
NOT_IN_OLD = ("modelopt", "groups", "fp8", "awq", "auto-round")


@functools.cache
def engine_answers(version: str) -> dict[str, Any]:
    layers = [f"model.layers.{number}.mlp.experts" for number in range(LAYERS)]
    asked = {
        name: {"section": section, "layers": layers}
        for name, section in SECTIONS.items()
        if version == "0.5.23" or not name.startswith(NOT_IN_OLD)
    }
    answers: dict[str, Any] = run_in_engine(version, CHILD, asked)
    return answers


def ours(section: dict[str, Any], version: str) -> Quantization | None:
    """None where we refuse the checkpoint."""
    try:
        found = from_config(QWEN | {"quantization_config": section}, name="model", source="config.json")
    except ModelError as refused:
        assert str(refused).isprintable()
        return None
    return sglang.read_as(found, sglang_version(version)).quantization


def sglang_version(text: str) -> tuple[int, int, int]:
    first, second, third = map(int, text.split("."))
    return first, second, third


def same(quantization: Quantization, answer: list[Any]) -> bool:
    strategy, bits, group = answer
    stored = quantization.checkpoint
    if strategy is None or stored is None:
        return strategy is None and quantization == Quantization()
    per_channel = group in (None, -1)
    return quantization.weight_bits == bits and (
        quantization.scales in ("channel", "tensor") if per_channel else quantization.block_shape == (0, group)
    )


@pytest.mark.parametrize(
    ("version", "name"),
    [
        (version, name)
        for version in RELEASES
        for name in SECTIONS
        if version == "0.5.23" or name.startswith("compressed")
    ],
)
def test_experts_are_read_as_the_engine_stores_them(version: str, name: str) -> None:
    answer = engine_answers(version)[name]
    found = ours(SECTIONS[name], version)
    if isinstance(answer, str) or any(one[0] == "mixed" for one in answer):
        assert found is None, answer
        return
    (most, _), *others = Counter(map(tuple, answer)).most_common()
    is_mixed = bool(others) and (most[0] is None or any(kind[0] is not None for kind, _ in others))
    if is_mixed:
        assert found is None, answer
    else:
        assert found is not None
        assert same(found, list(most)), (found, answer)


def shape_of(name: str, tp: int = 1) -> MoEShape:
    return sglang.launched_shape(resolve(str(CASES / name)), Parallelism(tp))


def table_of(shape: MoEShape, device: str = "NVIDIA_H200") -> str:
    return table_names.file_name(table_names.table_key(shape, device))


def test_02_experts_that_are_all_excluded_by_name_are_not_quantized() -> None:
    assert table_of(shape_of("02-experts-excluded-one-by-one")) == "E=8,N=768,device_name=NVIDIA_H200.json"


def test_02_the_same_list_without_one_layer_is_refused_as_mixed() -> None:
    config = json.loads((CASES / "02-experts-excluded-one-by-one" / "config.json").read_text())
    section = config["quantization_config"]
    section["ignore"] = [name for name in section["ignore"] if ".layers.2." not in name]
    with pytest.raises(ModelError, match="experts of 3 of 4 MoE layers are not quantized"):
        from_config(config, name="model", source="config.json")


def test_03_bits_of_experts_in_extra_config_win() -> None:
    shape = shape_of("03-autoround-extra-config")
    assert shape.quantization == Quantization("int4_w4a16", (0, 64))
    assert table_of(shape, "NVIDIA_RTX_4090") == "E=128,N=384,device_name=NVIDIA_RTX_4090,dtype=int4_w4a16.json"


def test_04_a_split_halves_the_group_of_awq() -> None:
    shape = shape_of("04-awq-split-that-marlin-refuses", tp=8)
    assert (shape.experts, shape.intermediate_size) == (161, 192)
    assert shape.quantization == Quantization("int4_w4a16", (0, 64))


def test_04_a_group_that_would_fall_below_32_is_refused() -> None:
    with pytest.raises(ModelError, match="no multiple of its group of 128 weights, nor of a half"):
        shape_of("04-awq-split-that-marlin-refuses", tp=32)


def test_07_layers_of_different_widths_are_refused_with_the_shape_of_each() -> None:
    with pytest.raises(ModelError) as refused:
        resolve(str(CASES / "07-layers-of-different-widths"))
    message = str(refused.value)
    for width, top_k in ((2688, 22), (1280, 4), (1792, 8), (2048, 18)):
        assert f"--shape E=512,N={width},K=1024,topk={top_k},dtype=bfloat16,gated=False" in message
    assert "block_configs" in message


def test_07_layers_that_agree_are_one_layer() -> None:
    config = json.loads((CASES / "07-layers-of-different-widths" / "config.json").read_text())
    config["block_configs"] = [
        block for block in config["block_configs"] if block.get("moe_intermediate_size") in (None, 1280)
    ]
    model = from_config(config, name="model", source="config.json")
    assert (model.routed_experts, model.intermediate_size, model.hidden_size, model.top_k) == (512, 1280, 1024, 4)
    assert not model.gated


def test_16_a_native_mistral_folder_is_read() -> None:
    model = resolve(str(CASES / "16-mistral-native-folder"))
    assert (model.routed_experts, model.top_k, model.intermediate_size, model.hidden_size) == (128, 4, 4096, 7168)
    assert model.quantization == Quantization("fp8_w8a8")


def test_16_a_native_mistral_folder_without_quantization_is_read() -> None:
    model = resolve(str(CASES / "16-mistral-native-folder" / "second"))
    assert (model.routed_experts, model.top_k, model.intermediate_size, model.hidden_size) == (128, 4, 2048, 4096)
    assert model.quantization == Quantization()


def test_20_a_block_that_a_split_cuts_is_refined_by_vllm_0_33() -> None:
    model = resolve(str(CASES / "20-split-that-older-vllm-refuses"))
    shape = vllm.launched_shape(model, Parallelism(8), engine_version=(0, 33, 0))
    assert shape.quantization == Quantization("fp8_w8a8", (64, 64))


@pytest.mark.parametrize("version", [(0, 20, 2), (0, 25, 1)], ids=str)
def test_20_a_block_that_a_split_cuts_is_refused_by_older_vllm(version: tuple[int, int, int]) -> None:
    model = resolve(str(CASES / "20-split-that-older-vllm-refuses"))
    with pytest.raises(ModelError, match=r"no multiple of its block \[128, 128\]: vLLM 0\.2"):
        vllm.launched_shape(model, Parallelism(8), engine_version=version)


def test_a_list_of_parents_means_unquantized_experts_to_sglang_before_0_5_18() -> None:
    section = compressed(modules("model.layers.{layer}.mlp.experts.{expert}"))
    readings = {version: ours(section, version) for version in ("0.5.8", "0.5.12", "0.5.15", "0.5.18", "0.5.23")}
    fp8_channel = Quantization("fp8_w8a8", per_channel=True)
    assert readings == {
        "0.5.8": fp8_channel,
        "0.5.12": Quantization(),
        "0.5.15": Quantization(),
        "0.5.18": fp8_channel,
        "0.5.23": fp8_channel,
    }


def test_modelopt_with_nvfp4_experts_names_the_draft_whose_experts_run_triton() -> None:
    layers = {f"model.layers.{layer}.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16} for layer in range(LAYERS)}
    layers["model.layers.4.mlp.experts"] = {"quant_algo": "FP8_PB_WO", "group_size": 128}
    section = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    with pytest.raises(ModelError) as refused:
        from_config(QWEN | {"quantization_config": section}, name="model", source="config.json")
    assert "NVFP4" in str(refused.value)
    assert "fp8_w8a8 block [128, 128]" in str(refused.value)


def served(**config: Any) -> MoEModel:
    return from_config(QWEN | config, name="model", source="config.json")


def test_a_float32_checkpoint_is_served_as_each_engine_does() -> None:
    model = served(torch_dtype="float32")
    assert sglang.launched_shape(model, Parallelism()).dtype == "float16"
    assert vllm.launched_shape(model, Parallelism()).dtype == "bfloat16"


def test_int8_experts_of_compressed_tensors_are_vllms_alone() -> None:
    group = {
        "targets": ["Linear"],
        "weights": weights("int", 8, "channel"),
        "input_activations": {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True},
    }
    model = served(quantization_config=compressed([], group_0=group))
    assert vllm.launched_shape(model, Parallelism()).quantization == Quantization("int8_w8a8", per_channel=True)
    with pytest.raises(ModelError, match="NotImplementedError on a GPU"):
        sglang.launched_shape(model, Parallelism())


def test_patterns_that_never_end_are_not_run() -> None:
    start = time.monotonic()
    evil = [r"re:(.*e)*(.*x)*(.*p)*z", r"re:(a|a)*$", r"re:.*.*.*.*.*.*.*.*.*z", "re:(", r"re:^(\w+\.?)+!$"]
    assert ours(compressed(evil), "0.5.23") == Quantization("fp8_w8a8", per_channel=True)
    assert ours(modelopt("*" * 50 + "z", "*a" * 40), "0.5.23") == Quantization("fp8_w8a8")
    assert time.monotonic() - start < 5


def test_a_list_without_end_is_refused() -> None:
    with pytest.raises(ModelError, match="ignore has 262145 entries"):
        served(quantization_config=compressed(["x"] * 262_145))


@pytest.mark.parametrize("method", ["fp8", "awq", "compressed-tensors", "modelopt", "gptq"])
def test_a_long_list_is_read_in_bounded_time(method: str) -> None:
    start = time.monotonic()
    section = {"fp8": fp8, "awq": awq, "modelopt": modelopt}.get(method, fp8)() | {
        "quant_method": method,
        "bits": 4,
        "group_size": 128,
        "ignore": [f"model.layers.{number}.self_attn.q_proj{'x' * (number % 50)}" for number in range(200_000)],
    }
    served(quantization_config=section, num_hidden_layers=94)
    assert time.monotonic() - start < 15
