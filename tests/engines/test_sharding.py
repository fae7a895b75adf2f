"""How each engine cuts a model onto ranks: the E, N and top-k that its file names carry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sglang_moe_ext.core import ModelError, MoEModel, Parallelism, Quantization
from sglang_moe_ext.engines.sglang import sharding as sglang
from sglang_moe_ext.engines.vllm import sharding as vllm
from sglang_moe_ext.models.checkpoint_names import find_builtin

FP8_BLOCK = Quantization("fp8_w8a8", (128, 128))
MIXTRAL = MoEModel("Mixtral-8x7B", "MixtralForCausalLM", 8, 2, 4096, 14336)


def model(name: str, quantization: Quantization | None = None) -> MoEModel:
    found = find_builtin(name)
    assert found is not None, name
    return found if quantization is None else replace(found, quantization=quantization)


def numbers(shape: object) -> tuple[int, ...]:
    return tuple(getattr(shape, name) for name in ("experts", "intermediate_size", "hidden_size", "top_k", "ep"))


@pytest.mark.parametrize(
    ("name", "parallelism", "expected"),
    [
        ("GLM-4.7-Flash", Parallelism(1), (65, 1536, 2048, 5, 1)),
        ("GLM-4.7-Flash", Parallelism(4), (65, 384, 2048, 5, 1)),
        ("GLM-4.7-Flash", Parallelism(4, 4), (16, 1536, 2048, 4, 4)),
        ("GLM-4.7-Flash", Parallelism(4, 2), (32, 768, 2048, 4, 2)),
        ("Qwen3-30B-A3B", Parallelism(1), (128, 768, 2048, 8, 1)),
        ("Qwen3-30B-A3B", Parallelism(8), (128, 96, 2048, 8, 1)),
        ("Qwen3-30B-A3B", Parallelism(8, 8), (16, 768, 2048, 8, 8)),
    ],
    ids=["GLM", "GLM tp 4", "GLM ep 4", "GLM tp 4 ep 2", "Qwen", "Qwen tp 8", "Qwen ep 8"],
)
def test_sglang_launches_this_layer(name: str, parallelism: Parallelism, expected: tuple[int, ...]) -> None:
    assert numbers(sglang.launched_shape(model(name, Quantization()), parallelism)) == expected


def test_shared_experts_that_are_not_fused_change_nothing() -> None:
    shape = sglang.launched_shape(model("GLM-4.7-Flash"), Parallelism(), fuse_shared_experts=False)
    assert (shape.experts, shape.top_k, shape.fused_shared) == (64, 4, 0)


def test_the_fused_shared_expert_is_counted() -> None:
    assert sglang.launched_shape(model("GLM-4.7-Flash"), Parallelism()).fused_shared == 1


@pytest.mark.parametrize(
    ("of", "parallelism", "culprit"),
    [
        (MIXTRAL, Parallelism(3), "14336.*--tp-size 3"),
        (MIXTRAL, Parallelism(16, 16), "8 experts: --ep-size 16"),
        (MIXTRAL, Parallelism(4, 3), "tp divisible by ep"),
        (MIXTRAL, Parallelism(0), "positive sizes"),
        (MIXTRAL, Parallelism(1, 0), "positive sizes"),
        (model("Qwen3-30B-A3B", FP8_BLOCK), Parallelism(4), r"192 columns.*\[128, 128\]"),
    ],
    ids=["columns", "experts", "ep beside tp", "no rank", "no expert rank", "through a block"],
)
def test_sglang_refuses_an_uneven_split_and_names_the_culprit(
    of: MoEModel, parallelism: Parallelism, culprit: str
) -> None:
    with pytest.raises(ModelError, match=culprit):
        sglang.launched_shape(of, parallelism)


def test_groups_along_k_are_no_hindrance_to_a_split() -> None:
    grouped = model("Qwen3-30B-A3B", Quantization("int4_w4a16", (0, 128)))
    assert sglang.launched_shape(grouped, Parallelism(4)).intermediate_size == 192


@pytest.mark.parametrize(
    ("name", "parallelism", "expected"),
    [
        ("GLM-4.7-Flash", Parallelism(1), (64, 1536, 2048, 4, 1)),
        ("GLM-4.7-Flash", Parallelism(4), (64, 384, 2048, 4, 1)),
        ("GLM-4.7-Flash", Parallelism(4, 2), (16, 1536, 2048, 4, 4)),
        ("Qwen3-30B-A3B", Parallelism(8, 8), (16, 768, 2048, 8, 8)),
    ],
    ids=["GLM", "GLM tp 4", "GLM ep over all ranks", "Qwen ep 8"],
)
def test_vllm_launches_this_layer(name: str, parallelism: Parallelism, expected: tuple[int, ...]) -> None:
    assert numbers(vllm.launched_shape(model(name, Quantization()), parallelism)) == expected


@pytest.mark.parametrize(
    ("tp", "block"),
    [(1, (128, 128)), (2, (128, 128)), (4, (64, 64)), (8, (32, 32))],
    ids=["tp 1", "tp 2", "tp 4", "tp 8"],
)
def test_vllm_halves_a_block_until_it_divides_a_ranks_columns(tp: int, block: tuple[int, int]) -> None:
    shape = vllm.launched_shape(model("Qwen3-30B-A3B", FP8_BLOCK), Parallelism(tp))
    assert shape.quantization.block_shape == block


@pytest.mark.parametrize(
    ("of", "parallelism"),
    [
        (MIXTRAL, Parallelism(3)),
        (MIXTRAL, Parallelism(16, 16)),
        (model("Qwen3-30B-A3B", FP8_BLOCK), Parallelism(16)),
    ],
    ids=["columns", "experts", "below the smallest block"],
)
def test_vllm_refuses_an_uneven_split(of: MoEModel, parallelism: Parallelism) -> None:
    with pytest.raises(ModelError, match=of.name):
        vllm.launched_shape(of, parallelism)


@pytest.mark.parametrize("parallelism", [Parallelism(0), Parallelism(-1), Parallelism(1, 0)], ids=["0", "-1", "ep 0"])
def test_vllm_refuses_sizes_that_are_not_positive(parallelism: Parallelism) -> None:
    with pytest.raises(ModelError, match="expected positive sizes"):
        vllm.launched_shape(MIXTRAL, parallelism)
