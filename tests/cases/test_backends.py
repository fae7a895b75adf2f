"""Which kernel an engine runs a layer's experts by, held against the engines' own functions."""

from __future__ import annotations

import argparse
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.cli import doctor, layer_args
from sglang_moe_ext.cli.layer_args import LayerArgs
from sglang_moe_ext.core import CheckpointFormat, ModelError, MoEModel, MoEShape, Parallelism, Quantization
from sglang_moe_ext.engines.quantization_flag import quantize_as_served
from sglang_moe_ext.engines.sglang import server_info
from sglang_moe_ext.engines.sglang import sharding as sglang_sharding
from sglang_moe_ext.engines.sglang import support as sglang
from sglang_moe_ext.engines.vllm import sharding as vllm_sharding
from sglang_moe_ext.engines.vllm import support as vllm
from sglang_moe_ext.engines.weight_only import marlin_takes
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.models import resolve
from tests.engines.installed import VLLM_VERSIONS, run_in_engine, run_in_vllm, vllm_environment

pytestmark = pytest.mark.usefixtures("forked_engines")

CASES = Path(__file__).parents[1] / "data" / "cases"
CHILDREN = Path(__file__).parents[1] / "engines" / "children"
H200, B200, RTX_4090, A100 = (find_gpu(name) for name in ("H200", "B200", "RTX_4090", "A100"))
SIZES = list(itertools.product((2048, 5120, 2880, 7168), (64, 96, 192, 384, 768, 1536), (-1, 32, 64, 128)))
SGLANG_VERSIONS = ("0.5.15", "0.5.20", "0.5.23")


def case(name: str) -> str:
    (found,) = CASES.glob(f"{name}-*")
    return str(found)


def sharded(name: str, tp: int = 1) -> tuple[MoEModel, MoEShape]:
    model = resolve(case(name))
    return model, sglang_sharding.launched_shape(model, Parallelism(tp))


def weight_only(columns: int, hidden: int, group: int, method: str = "awq", **others: Any) -> MoEShape:
    stored = CheckpointFormat(method, 4, None if group == -1 else group, **others)
    if group == -1:
        return MoEShape(8, columns, hidden, 2, Quantization("int4_w4a16", per_channel=True, checkpoint=stored))
    return MoEShape(8, columns, hidden, 2, Quantization("int4_w4a16", (0, group), checkpoint=stored))


def section(bits: int = 4, group: int | None = 128, strategy: str = "group", **others: Any) -> dict[str, Any]:
    weights = {"type": "int", "num_bits": bits, "strategy": strategy, "group_size": group, "symmetric": True} | others
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": [],
        "config_groups": {"a": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }


SECTIONS: dict[str, dict[str, Any]] = {
    "4 bits in groups of 128": section(),
    "4 bits in groups of 32": section(group=32),
    "4 bits in groups of 64": section(group=64),
    "8 bits": section(bits=8),
    "asymmetric": section(symmetric=False),
    "with an activation order": section(actorder="group"),
    "per channel": section(group=None, strategy="channel"),
}
ASKED = [(name, backend, is_sm100) for name in SECTIONS for backend in ("auto", "triton") for is_sm100 in (False, True)]


@functools.cache
def sglang_answers(version: str) -> dict[str, Any]:
    schemes = [{"section": SECTIONS[name], "backend": flag, "is_sm100": new} for name, flag, new in ASKED]
    answers: dict[str, Any] = run_in_engine(
        version, CHILDREN / "sglang_backends.py", {"marlin": SIZES, "schemes": schemes}
    )
    return answers


@pytest.mark.parametrize("version", SGLANG_VERSIONS)
def test_marlin_takes_what_sglang_says_it_does(version: str) -> None:
    asked = dict(zip(SIZES, sglang_answers(version)["marlin"], strict=True))
    told = {case: marlin_takes(weight_only(case[1], case[0], case[2]), pads_columns=False) for case in SIZES}
    assert told == asked


@pytest.mark.parametrize("version", SGLANG_VERSIONS)
@pytest.mark.parametrize("name", SECTIONS)
def test_weights_of_compressed_tensors_run_the_scheme_that_sglang_picks(version: str, name: str) -> None:
    from sglang_moe_ext.models import quantization_from_config

    quantization = quantization_from_config({"quantization_config": SECTIONS[name]})
    shape = MoEShape(128, 768, 2048, 8, quantization)
    release = sglang_release(version)
    for (asked, backend, is_sm100), scheme in zip(ASKED, sglang_answers(version)["schemes"], strict=True):
        if asked != name:
            continue
        told = sglang.why_no_table(backend, shape, B200 if is_sm100 else H200, "Qwen3MoeForCausalLM", release)
        reads = scheme == "CompressedTensorsWNA16TritonMoE"
        if version == "0.5.15" and backend == "triton" and reads and name not in list(SECTIONS)[:2]:
            continue  # it takes whatever its kernel may make of them; 0.5.20 names what is right
        assert (told is None) == reads, (backend, is_sm100, scheme, told)


def sglang_release(text: str) -> tuple[int, int, int]:
    first, second, third = map(int, text.split("."))
    return first, second, third


@functools.cache
def vllm_answers(version: str) -> dict[str, Any]:
    request = {"marlin": [(*size, pads) for size in SIZES for pads in (False, True)], "blocks": BLOCKS}
    answers: dict[str, Any] = run_in_vllm(CHILDREN / "vllm_backends.py", request, vllm_environment(version))
    return answers


BLOCKS = list(itertools.product((192, 96, 128, 48, 256, 320), (3072, 2048, 2880), (1, 8)))


@pytest.mark.parametrize("version", VLLM_VERSIONS)
def test_marlin_takes_what_vllm_says_it_does(version: str) -> None:
    asked = [(*size, pads) for size in SIZES for pads in (False, True)]
    can_pad = version != "0.20.2"
    told = [marlin_takes(weight_only(c, h, g), pads_columns=pads and can_pad) for h, c, g, pads in asked]
    assert dict(zip(asked, told, strict=True)) == dict(zip(asked, vllm_answers(version)["marlin"], strict=True))


@pytest.mark.parametrize("version", VLLM_VERSIONS)
def test_blocks_are_refined_as_vllm_does(version: str) -> None:
    for (columns, hidden, ranks), refined in zip(BLOCKS, vllm_answers(version)["blocks"], strict=True):
        model = MoEModel("m", "A", 8, 2, hidden, columns * ranks, quantization=Quantization("fp8_w8a8", (128, 128)))
        try:
            shape = vllm_sharding.launched_shape(model, Parallelism(ranks), engine_version=sglang_release(version))
        except ModelError:
            assert refined is None, (columns, hidden, ranks)
        else:
            block = shape.quantization.block_shape
            assert (None if block == (128, 128) else list(block or ())) == refined, (columns, hidden, ranks)


def test_04_a_split_that_marlin_refuses_reads_the_table() -> None:
    model, shape = sharded("04", tp=8)
    assert sglang.why_no_table("auto", shape, RTX_4090, model.architecture) is None
    assert vllm.why_no_table(shape, RTX_4090, model.architecture) is None


def test_04_a_split_that_marlin_takes_reads_none() -> None:
    model, shape = sharded("04")
    for flag in ("auto", "triton"):
        assert "Marlin" in str(sglang.why_no_table(flag, shape, RTX_4090, model.architecture))
    assert "Marlin" in str(vllm.why_no_table(shape, RTX_4090, model.architecture))


@pytest.mark.parametrize(
    ("flag", "gpu", "version", "reads"),
    [
        ("auto", B200, (0, 5, 23), True),
        ("auto", B200, (0, 5, 20), True),
        ("auto", B200, (0, 5, 18), False),
        ("auto", H200, (0, 5, 23), False),
        ("triton", H200, (0, 5, 23), True),
        ("triton", H200, (0, 5, 10), False),
    ],
    ids=str,
)
def test_05_int4_of_compressed_tensors_reads_a_table_where_triton_runs_it(
    flag: str, gpu: Any, version: tuple[int, int, int], reads: bool
) -> None:
    model, shape = sharded("05")
    assert (sglang.why_no_table(flag, shape, gpu, model.architecture, version) is None) == reads


def test_05_groups_of_32_of_kimi_run_flashinfer_on_a_b200() -> None:
    shape = weight_only(2048, 7168, 32, "compressed_tensors")
    why = sglang.why_no_table("auto", shape, B200, "KimiK25ForConditionalGeneration")
    assert why is not None
    assert "FlashInfer" in why


@pytest.mark.parametrize(
    ("name", "gpu", "reads"),
    [
        ("Qwen3-30B-A3B-AWQ", B200, False),
        ("Qwen3-30B-A3B-GPTQ-Int4", B200, False),
        ("Qwen3-30B-A3B-quantized.w4a16", B200, True),
        ("Qwen3-30B-A3B-quantized.w4a16", H200, False),
    ],
)
def test_the_method_that_a_name_tells_decides_as_the_checkpoints_own(name: str, gpu: Any, reads: bool) -> None:
    model = resolve(name)
    shape = sglang_sharding.launched_shape(model, Parallelism())
    assert (sglang.why_no_table("auto", shape, gpu, model.architecture) is None) == reads


def test_06_gptq_of_8_bits_runs_marlin() -> None:
    model, shape = sharded("06")
    assert "Marlin" in str(sglang.why_no_table("auto", shape, H200, model.architecture))
    assert "Marlin" in str(vllm.why_no_table(shape, H200, model.architecture))


def test_asymmetric_gptq_is_refused_by_sglang() -> None:
    stored = CheckpointFormat("gptq", 4, 128, symmetric=False)
    model = MoEModel("m", "A", 8, 2, 2048, 768, quantization=Quantization("int4_w4a16", (0, 128), checkpoint=stored))
    with pytest.raises(ModelError, match="asymmetric"):
        sglang_sharding.launched_shape(model, Parallelism())
    assert vllm_sharding.launched_shape(model, Parallelism()).intermediate_size == 768


def test_a_checkpoint_of_moe_wna16_reads_the_table() -> None:
    shape = weight_only(768, 2048, 128, "moe_wna16")
    assert sglang.why_no_table("auto", shape, H200, "") is None
    assert vllm.why_no_table(shape, H200, "") is None


def parsed(*flags: str) -> LayerArgs:
    parser = argparse.ArgumentParser()
    doctor.add_to(parser)
    arguments = parser.parse_args(flags)
    arguments.engine = arguments.engine or "sglang"
    return layer_args.parse_layer(arguments)


def quantized(stated: Quantization, columns: int = 1536) -> MoEModel:
    return MoEModel("m", "A", 8, 2, 2048, columns, quantization=stated)


def of_groups(method: str, **others: Any) -> Quantization:
    stored = CheckpointFormat(method, **{"bits": 4, "group": 128} | others)
    return Quantization("int4_w4a16" if stored.bits == 4 else "int8_w8a16", (0, 128), checkpoint=stored)


@pytest.mark.parametrize("name", ["04", "06"])
def test_moe_wna16_reads_the_table_of_awq_and_gptq(name: str) -> None:
    layer = parsed("--model", case(name), "--quantization", "moe_wna16")
    plain = parsed("--model", case(name))
    assert sglang.why_no_table("auto", plain.shape, H200, plain.architecture) is not None
    assert sglang.why_no_table("auto", layer.shape, H200, layer.architecture) is None
    assert layer.vllm_shape is not None
    assert vllm.why_no_table(layer.vllm_shape, H200, layer.architecture) is None
    assert str(layer.shape) == str(plain.shape)


def test_doctor_examines_the_layer_as_a_server_with_moe_wna16_runs_it() -> None:
    answer = {"model_path": case("04"), "version": "0.5.23", "tp_size": 8, "quantization": "moe_wna16"}
    server = server_info.parse(answer, "http://here")
    parser = argparse.ArgumentParser()
    doctor.add_to(parser)
    flags = doctor._as_served(parser.parse_args(["--url", "http://here"]), server)
    examined = doctor._layer(flags, server).shape
    assert examined.quantization.block_shape == (0, 64)
    assert sglang.why_no_table("auto", examined, H200, "") is None


def test_moe_wna16_halves_the_groups_of_gptq_too() -> None:
    served = quantize_as_served(quantized(of_groups("gptq")), "moe_wna16", "sglang", sglang.NEWEST)
    assert sglang_sharding.launched_shape(served, Parallelism(8)).quantization.block_shape == (0, 64)


def test_moe_wna16_serves_asymmetric_gptq_which_marlin_does_not() -> None:
    served = quantize_as_served(quantized(of_groups("gptq", symmetric=False)), "moe_wna16", "sglang", sglang.NEWEST)
    assert sglang_sharding.launched_shape(served, Parallelism()).experts == 8


@pytest.mark.parametrize(
    ("flag", "engine", "expected"),
    [
        ("fp8", "sglang", Quantization("fp8_w8a8")),
        ("w8a8-fp8", "sglang", Quantization("fp8_w8a8", per_channel=True)),
        ("FP8_per_block", "vllm", Quantization("fp8_w8a8", (128, 128))),
        ("fp8_per_channel", "vllm", Quantization("fp8_w8a8", per_channel=True)),
        ("experts_int8", "vllm", Quantization("int8_w8a16", per_channel=True)),
    ],
)
def test_weights_that_the_server_quantizes_have_the_scheme_of_its_flag(
    flag: str, engine: str, expected: Quantization
) -> None:
    assert quantize_as_served(quantized(Quantization()), flag, engine, (0, 33, 0)).quantization == expected


def test_older_vllm_runs_gptq_by_triton_where_the_flag_says_gptq() -> None:
    for version, method in (((0, 20, 2), "moe_wna16"), ((0, 33, 0), "gptq")):
        stored = quantize_as_served(quantized(of_groups("gptq")), "gptq", "vllm", version).quantization.checkpoint
        assert stored is not None and stored.method == method


@pytest.mark.parametrize(
    ("stated", "flag", "engine", "complaint"),
    [
        (Quantization(), "moe_wna16", "sglang", "is not quantized"),
        (Quantization("fp8_w8a8", checkpoint=CheckpointFormat("fp8")), "moe_wna16", "sglang", "8 bits of fp8"),
        (of_groups("gptq", activation_order=True), "moe_wna16", "sglang", "order of their own"),
        (of_groups("awq"), "awq", "sglang", "awq_marlin or moe_wna16"),
        (of_groups("awq"), "gptq_marlin", "vllm", "refuses the flag"),
        (Quantization(), "mxfp4", "sglang", "no table is read"),
        (Quantization(), "fp9", "vllm", "not known for vLLM: expected one of auto_awq"),
        (Quantization(), "a\x1b[31m" * 3000, "sglang", "not known"),
    ],
)  # fmt: skip
def test_a_flag_that_the_engine_refuses_is_refused_in_one_line(
    stated: Quantization, flag: str, engine: str, complaint: str
) -> None:
    with pytest.raises(ModelError, match=complaint) as refused:
        quantize_as_served(quantized(stated), flag, engine, sglang.NEWEST if engine == "sglang" else vllm.NEWEST)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 700


def test_one_flag_at_a_time_says_how_the_weights_are_stored() -> None:
    with pytest.raises(ModelError, match="does not go with --dtype"):
        parsed("--model", case("04"), "--quantization", "moe_wna16", "--dtype", "bf16")


def test_the_redundant_experts_of_a_server_are_its_layers() -> None:
    answer = {"model_path": "DeepSeek-R1", "version": "0.5.15", "tp_size": 8, "ep_size": 8}
    server = server_info.parse(answer | {"ep_num_redundant_experts": 32}, "http://here")
    parser = argparse.ArgumentParser()
    doctor.add_to(parser)
    flags = doctor._as_served(parser.parse_args(["--url", "http://here"]), server)
    assert doctor._layer(flags, server).shape.experts == 36


def test_fp8_reads_no_table_where_the_gpu_has_no_fp8_units() -> None:
    shape = MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128)))
    for flag in ("auto", "triton"):
        assert "no fp8 matrix units" in str(sglang.why_no_table(flag, shape, A100, ""))
    assert "Marlin" in str(vllm.why_no_table(shape, A100, ""))


def test_refined_blocks_run_triton_on_a_b200() -> None:
    refined = MoEShape(256, 192, 3072, 8, Quantization("fp8_w8a8", (64, 64)))
    whole = MoEShape(256, 256, 3072, 8, Quantization("fp8_w8a8", (128, 128)))
    assert vllm.why_no_table(refined, B200, "") is None
    assert vllm.why_no_table(whole, B200, "") is not None


def test_every_reason_says_that_it_was_read_and_not_asked() -> None:
    model, shape = sharded("04")
    for why in (
        sglang.why_no_table("auto", shape, H200, model.architecture),
        sglang.why_no_table("flashinfer_cutlass", MoEShape(8, 768, 2048, 2), H200, ""),
        vllm.why_no_table(shape, H200, model.architecture),
    ):
        assert "not asked of the engine" in str(why)
