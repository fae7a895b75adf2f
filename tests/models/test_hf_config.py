"""from_config: every spelling and wrapping of the same experts, and what it refuses."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_moe_ext.core import ModelError, MoEModel
from sglang_moe_ext.models import from_config
from sglang_moe_ext.models.config_fields import WRAPPERS
from sglang_moe_ext.models.field_spellings import EXPERTS, SHARED, TOP_K, WIDTH
from tests.examples import examples

GLM_FLASH: dict[str, Any] = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "model_type": "glm4_moe_lite",
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "torch_dtype": "bfloat16",
}


def read(config: object) -> MoEModel:
    return from_config(config, name="model", source="config.json")


def sizes(model: MoEModel) -> tuple[int, int, int, int, int]:
    return model.routed_experts, model.top_k, model.hidden_size, model.intermediate_size, model.shared_experts


def refusal(config: object) -> str:
    with pytest.raises(ModelError) as refused:
        read(config)
    message = str(refused.value)
    assert message.isprintable()
    return message


def test_the_experts_of_glm_4_7_flash_are_read() -> None:
    assert read(GLM_FLASH) == MoEModel(
        name="model",
        architecture="Glm4MoeLiteForCausalLM",
        routed_experts=64,
        top_k=4,
        hidden_size=2048,
        intermediate_size=1536,
        shared_experts=1,
        source="config.json",
    )


FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, int, int, int, int]]] = {
    "mixtral, where intermediate_size is an expert's": (
        {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 4096}
        | {"intermediate_size": 14336},
        (8, 2, 4096, 14336, 0),
    ),
    "dbrx, whose d_model is not the hidden_size of its ffn_config": (
        {"model_type": "dbrx", "d_model": 6144}
        | {"ffn_config": {"moe_num_experts": 16, "moe_top_k": 4, "ffn_hidden_size": 10752, "hidden_size": 2048}},
        (16, 4, 6144, 10752, 0),
    ),
    "ernie vl, whose first expert width is that of text": (
        {"model_type": "ernie4_5_moe_vl", "moe_num_experts": [64, 64], "moe_k": 6, "hidden_size": 2560}
        | {"moe_intermediate_size": [1536, 512], "moe_num_shared_experts": 2},
        (64, 6, 2560, 1536, 2),
    ),
    "hunyuan, which states a list with one number a layer": (
        {"model_type": "hunyuan_v1_moe", "num_experts": 64, "moe_topk": [8] * 32, "hidden_size": 4096}
        | {"intermediate_size": 3072, "moe_intermediate_size": [3072] * 32, "num_shared_expert": [1] * 32},
        (64, 8, 4096, 3072, 1),
    ),
    "kimi k3, whose experts work in a latent space": (
        {
            "text_config": {"model_type": "kimi_linear", "num_experts": 896, "num_experts_per_token": 16}
            | {"hidden_size": 7168, "routed_expert_hidden_size": 3584, "moe_intermediate_size": 3072}
        },
        (896, 16, 3584, 3072, 0),
    ),
    "llama 4, whose intermediate_size_mlp is its dense layers'": (
        {
            "text_config": {"model_type": "llama4_text", "num_local_experts": 16, "num_experts_per_tok": 1}
            | {"hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384}
        },
        (16, 1, 5120, 8192, 0),
    ),
    "longcat, whose zero experts are no weights": (
        {"model_type": "longcat_flash", "n_routed_experts": 512, "zero_expert_num": 256, "moe_topk": 12}
        | {"hidden_size": 6144, "ffn_hidden_size": 12288, "expert_ffn_hidden_size": 2048},
        (512, 12, 6144, 2048, 0),
    ),
    "hunyuan 3 in its older spelling": (
        {"model_type": "hy_v3", "num_experts": 192, "num_experts_per_tok": 8, "num_shared_experts": 1}
        | {"hidden_size": 4096, "intermediate_size": 13312, "expert_hidden_dim": 1536},
        (192, 8, 4096, 1536, 1),
    ),
    "gemma 4, whose top-k has a name of its own": (
        {
            "text_config": {"model_type": "gemma4_text", "num_experts": 128, "top_k_experts": 8, "hidden_size": 2816}
            | {"intermediate_size": 2112, "moe_intermediate_size": 704}
        },
        (128, 8, 2816, 704, 0),
    ),
    "zaya, whose ffn_hidden_size is gate and up together": (
        {"model_type": "zaya", "num_experts": 16, "moe_router_topk": 1, "hidden_size": 2048, "ffn_hidden_size": 4096},
        (16, 1, 2048, 2048, 0),
    ),
    "muse spark, whose experts have a hidden size of their own": (
        {
            "text_config": {"model_type": "muse_spark_text", "num_local_experts": 256, "num_experts_per_tok": 8}
            | {"hidden_size": 8192, "moe_hidden_size": 4096, "moe_intermediate_size": 4096}
        },
        (256, 8, 4096, 4096, 0),
    ),
}


@pytest.mark.parametrize(("config", "expected"), FAMILIES.values(), ids=FAMILIES.keys())
def test_a_family_is_read_as_it_means_it(config: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert sizes(read(config)) == expected


NEMOTRON = {
    "model_type": "nemotron_h",
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "n_shared_experts": 1,
    "hidden_size": 4096,
    "moe_latent_size": 1024,
    "moe_intermediate_size": 2688,
    "mlp_hidden_act": "relu2",
    "hybrid_override_pattern": "MEM*E",
}


def test_nemotron_experts_are_not_gated_and_as_wide_as_their_latent_space() -> None:
    model = read(NEMOTRON)

    assert (model.gated, model.hidden_size, model.shared_experts) == (False, 1024, 0)


def test_a_nemotron_whose_layers_are_all_dense_is_dense_whatever_its_defaults_say() -> None:
    assert "a dense model" in refusal(NEMOTRON | {"hybrid_override_pattern": "M-M*-"})


def test_relu2_experts_of_an_unknown_family_are_not_gated() -> None:
    assert not read(GLM_FLASH | {"model_type": "new", "hidden_act": "relu2"}).gated


@pytest.mark.parametrize(
    ("stated", "expected"),
    [("float16", "float16"), ("torch.float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float32")],
)
def test_the_dtype_of_activations_is_the_checkpoints(stated: str, expected: str) -> None:
    assert read(GLM_FLASH | {"torch_dtype": stated}).dtype == expected


def test_the_text_model_is_read_where_a_talker_has_experts_too() -> None:
    talker = GLM_FLASH | {"n_routed_experts": 128}

    model = read({"talker_config": {"text_config": talker}, "thinker_config": {"text_config": GLM_FLASH}})

    assert model.routed_experts == 64


def test_the_root_names_the_architecture_because_an_engine_picks_that() -> None:
    config = {"architectures": ["KimiK25ForConditionalGeneration"], "text_config": GLM_FLASH}

    assert read(config).architecture == "KimiK25ForConditionalGeneration"


class _Treacherous:
    """A config class with an attribute that transformers 5.23 refuses to read, and one that is computed."""

    num_experts = 8
    hidden_size = 1024

    @property
    def n_routed_experts(self) -> int:
        raise RuntimeError("'n_routed_experts' is a per-layer attribute\nand may vary")

    @property
    def num_experts_per_tok(self) -> int:
        return 2

    @property
    def moe_intermediate_size(self) -> int:
        return 512

    def get_text_config(self) -> object:
        raise ValueError("ambiguous")


def test_an_attribute_that_cannot_be_read_counts_as_not_there() -> None:
    assert sizes(read(_Treacherous())) == (8, 2, 1024, 512, 0)


positive = st.integers(2, 1 << 12)


@settings(max_examples=examples(60))
@given(
    numbers=st.tuples(positive, positive, positive, st.integers(1, 8)),
    names=st.tuples(*(st.sampled_from(names) for names in (EXPERTS, TOP_K, WIDTH, SHARED, ("hidden_size", "d_model")))),
    wrappers=st.lists(st.sampled_from(WRAPPERS), max_size=4),
    as_object=st.booleans(),
)
def test_the_same_experts_resolve_alike_in_any_spelling_and_wrapping(
    numbers: tuple[int, int, int, int], names: tuple[str, ...], wrappers: list[str], as_object: bool
) -> None:
    experts, hidden, width, shared = numbers
    stated = dict(zip(names, (experts, 2, width, shared, hidden), strict=True))
    config: object = SimpleNamespace(**stated) if as_object else stated
    for wrapper in wrappers:
        config = SimpleNamespace(**{wrapper: config}) if as_object else {wrapper: config, "vision_config": {"depth": 2}}

    assert sizes(read(config)) == (experts, 2, hidden, width, shared)


NUMBERS = ("n_routed_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size")
IMPOSSIBLE: dict[str, object] = {
    "a string": "8",
    "a float": 8.0,
    "not a number": math.nan,
    "infinity": math.inf,
    "a bool": True,
    "negative": -4,
    "huge": 1 << 40,
    "too long to print": 10**6000,
    "an empty list": [],
    "a list of different layers": [8, 16],
    "an object": {"a": "line\nbreak"},
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_an_impossible_number_is_refused_in_one_line(name: str, value: object) -> None:
    message = refusal(GLM_FLASH | {name: value})

    assert name in message or "dense" in message


@pytest.mark.parametrize("name", NUMBERS[1:3])
def test_a_missing_number_is_named_with_what_to_do_next(name: str) -> None:
    message = refusal({key: value for key, value in GLM_FLASH.items() if key != name})

    assert name in message
    assert "--shape" in message


def test_zero_is_no_width() -> None:
    assert "moe_intermediate_size is 0" in refusal(GLM_FLASH | {"moe_intermediate_size": 0})


def test_more_experts_per_token_than_experts_are_refused() -> None:
    assert "65 experts per token of 64" in refusal(GLM_FLASH | {"num_experts_per_tok": 65})


@pytest.mark.parametrize("count", [None, 0, 1, [1, 1]], ids=["none", "zero", "one", "one a layer"])
def test_a_model_without_a_choice_of_experts_is_called_dense(count: object) -> None:
    assert "a dense model" in refusal(GLM_FLASH | {"n_routed_experts": count})


def test_layers_with_different_numbers_of_experts_are_refused() -> None:
    assert "from layer to layer" in refusal(GLM_FLASH | {"per_layer_config": {"3": {"n_routed_experts": 32}}})


def test_experts_that_are_rows_of_an_embedding_are_refused() -> None:
    assert "embedding" in refusal(GLM_FLASH | {"model_type": "doge"})


KNOWN = (*EXPERTS, *TOP_K, *WIDTH, *SHARED, *WRAPPERS, "ffn_config", "hidden_size", "d_model", "intermediate_size")
OTHERS = ("model_type", "architectures", "per_layer_config", "layers_block_type", "dtype", "hidden_act", "expert_dtype")
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(8), st.just(2))
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from((*KNOWN, *OTHERS, "quantization_config")), inner, max_size=8),
    ),
    max_leaves=20,
)


@settings(max_examples=examples(150))
@given(config=st.dictionaries(st.sampled_from((*KNOWN, *OTHERS)), json_values, max_size=8))
def test_arbitrary_json_is_read_or_refused_in_one_line(config: dict[str, object]) -> None:
    try:
        read(config)
    except ModelError as refused:
        assert str(refused).isprintable()
