"""resolve: folders, built-in names and the hub, and --shape; none of these tests needs a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_moe_ext.core import ModelError, MoEModel, MoEShape, Quantization
from sglang_moe_ext.models import builtin_models, hub, parse_shape, resolve
from sglang_moe_ext.models.builtin import builtin_records
from sglang_moe_ext.models.checkpoint_names import NameMatch, find_builtin, match_name
from tests.examples import examples

MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
}
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub cannot be reached, whatever this machine can reach."""

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route\nto host")

    import huggingface_hub

    monkeypatch.setattr(hub, "answers", lambda within_s: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "answers", lambda within_s: True)


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("transformers", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, module, None)


def checkpoint(folder: Path, config: object, **files: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def refusal(model: str, **options: bool) -> str:
    with pytest.raises(ModelError) as refused:
        resolve(model, **options)
    message = str(refused.value)
    assert message.isprintable()
    return message


def test_a_folder_is_read_and_named_after_itself(tmp_path: Path) -> None:
    model = resolve(checkpoint(tmp_path / "my-model", MIXTRAL))

    assert (model.name, model.routed_experts, model.source) == (
        "my-model",
        8,
        str(tmp_path / "my-model" / "config.json"),
    )


def test_a_path_to_the_config_itself_is_read(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "my-model", MIXTRAL)

    assert resolve(f"{folder}/config.json") == resolve(folder)


def test_a_config_under_another_name_is_read(tmp_path: Path) -> None:
    checkpoint(tmp_path, {}, mixtral=MIXTRAL)

    assert resolve(str(tmp_path / "mixtral.json")).name == "mixtral"


def test_a_folder_wins_over_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "DeepSeek-V3", MIXTRAL)
    monkeypatch.chdir(tmp_path)

    assert resolve("DeepSeek-V3").routed_experts == 8


def test_a_folder_without_a_config_does_not_hide_a_built_in_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "DeepSeek-V3").mkdir()
    monkeypatch.chdir(tmp_path)

    assert resolve("DeepSeek-V3").routed_experts == 256


def test_a_folder_that_says_it_all_needs_no_transformers(tmp_path: Path, without_transformers: None) -> None:
    assert resolve(checkpoint(tmp_path, MIXTRAL)).top_k == 2


def test_what_a_folder_leaves_out_comes_from_its_class(tmp_path: Path) -> None:
    model = resolve(checkpoint(tmp_path, {"model_type": "glm4_moe_lite", "n_routed_experts": 32}))

    assert (model.routed_experts, model.top_k, model.intermediate_size, model.shared_experts) == (32, 4, 1536, 1)


def test_a_shared_expert_that_a_nested_config_leaves_out_is_counted(tmp_path: Path) -> None:
    text = {"model_type": "glm4v_moe_text", "n_routed_experts": 128, "num_experts_per_tok": 8, "hidden_size": 4096}
    config = {"model_type": "glm4v_moe", "text_config": text | {"moe_intermediate_size": 1408}}

    assert resolve(checkpoint(tmp_path, config)).shared_experts == 1


def test_a_class_without_moe_layers_is_dense_though_its_defaults_count_experts(tmp_path: Path) -> None:
    config = {
        "model_type": "nemotron_h",
        "hidden_size": 8192,
        "hybrid_override_pattern": "M-M*-",
        "num_hidden_layers": 5,
    }

    assert "a dense model" in refusal(checkpoint(tmp_path, config))


def test_what_is_missing_without_transformers_is_named_with_the_way_on(
    tmp_path: Path, without_transformers: None
) -> None:
    message = refusal(checkpoint(tmp_path, {"model_type": "glm4_moe_lite", "n_routed_experts": 32}))

    assert "num_experts_per_tok" in message
    assert "pip install transformers" in message


def test_a_config_class_of_its_own_is_not_run_unless_asked_for(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {"model_type": "own", "num_experts": 8, "auto_map": {"AutoConfig": "own.Own"}})
    (tmp_path / "own.py").write_text("raise SystemExit('this code must not run')")

    assert "--trust-remote-code" in refusal(folder)


def test_a_config_class_of_its_own_fills_in_when_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    stated = {name: value for name, value in MIXTRAL.items() if name != "num_experts_per_tok"}
    folder = checkpoint(
        tmp_path / "own", stated | {"model_type": "own_moe", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    )
    (tmp_path / "own" / "own.py").write_text(
        "from transformers import PretrainedConfig\n\n\n"
        "class OwnConfig(PretrainedConfig):\n"
        "    model_type = 'own_moe'\n"
        "    moe_top_k = 3\n"
    )

    assert resolve(folder, trust_remote_code=True).top_k == 3


def test_modelopts_own_file_says_how_the_weights_are_stored(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, MIXTRAL, hf_quant_config={"quantization": {"quant_algo": "FP8"}})

    assert resolve(folder).quantization == Quantization("fp8_w8a8")


def test_a_null_in_the_config_does_not_hide_modelopts_file(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, MIXTRAL | {"quantization_config": None}, hf_quant_config={"quant_algo": "FP8"})

    assert resolve(folder).quantization == Quantization("fp8_w8a8")


def test_a_quantization_in_the_config_comes_before_modelopts_file(tmp_path: Path) -> None:
    config = MIXTRAL | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    folder = checkpoint(tmp_path, config, hf_quant_config={"quantization": {"quant_algo": "NVFP4"}})

    assert resolve(folder).quantization == Quantization("fp8_w8a8", (128, 128))


BROKEN: dict[str, bytes] = {
    "truncated": b'{"num_experts": 8, "hid',
    "empty": b"",
    "a list": b"[1, 2]",
    "a number": b"NaN",
    "not text": b"\xff\xfe\x00\x01",
    "too deep": b'{"a":' * 100_000,
    "a number too long": b'{"num_experts": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_config_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)

    assert str(tmp_path) in refusal(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_config_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, MIXTRAL)
    (tmp_path / "config.json").chmod(0)

    assert "permissions" in refusal(str(tmp_path))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(str(tmp_path))


@settings(max_examples=examples(80))
@given(content=st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_in_one_line(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_bytes(content)
        refusal(folder)


COMPLETE = json.dumps(MIXTRAL).encode()


@settings(max_examples=examples(60))
@given(cut=st.integers(0, len(COMPLETE)), noise=st.binary(max_size=3))
def test_a_damaged_config_is_read_or_refused_in_one_line(cut: int, noise: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_bytes(COMPLETE[:cut] + noise + COMPLETE[cut + len(noise) :])
        try:
            resolve(folder)
        except ModelError as refused:
            assert str(refused).isprintable()


oddities = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)
)


@settings(max_examples=examples(60))
@given(
    model_type=st.sampled_from(
        ["qwen3_moe", "glm4_moe_lite", "nemotron_h", "llama4", "dbrx", "ernie4_5_vl_moe", "gemma4"]
    ),
    fields=st.dictionaries(
        st.sampled_from(
            ["num_experts", "n_routed_experts", "hidden_size", "moe_intermediate_size", "text_config", "dtype"]
        ),
        oddities,
        max_size=3,
    ),
)
def test_what_a_config_class_makes_of_odd_values_is_read_or_refused_in_one_line(
    model_type: str, fields: dict[str, object]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({"model_type": model_type, **fields}))
        try:
            resolve(folder)
        except ModelError as refused:
            assert str(refused).isprintable()


@pytest.mark.parametrize(
    "spelling", ["GLM-4.7-Flash", "glm-4.7-flash", "zai-org/GLM-4.7-Flash", "ZAI-ORG/glm-4.7-flash"]
)
def test_a_built_in_model_is_found_by_each_of_its_names(spelling: str) -> None:
    model = resolve(spelling)

    assert (model.name, model.routed_experts, model.intermediate_size) == ("GLM-4.7-Flash", 64, 1536)


def test_a_built_in_model_is_found_by_its_hub_id_without_the_organisation() -> None:
    assert find_builtin("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16") == find_builtin("Nemotron-3-Nano-30B-A3B")


def test_the_fp8_checkpoint_of_a_model_is_found_by_its_published_name() -> None:
    found = find_builtin("Qwen/Qwen3-30B-A3B-FP8")
    assert found is not None
    assert (found.name, found.quantization) == ("Qwen3-30B-A3B-FP8", Quantization("fp8_w8a8", (128, 128)))


SUFFIXES: dict[str, tuple[str, Quantization]] = {
    "Qwen3-30B-A3B-Instruct-2507": ("Qwen3-30B-A3B", Quantization()),
    "Qwen/Qwen3-30B-A3B-Thinking-2507": ("Qwen3-30B-A3B", Quantization()),
    "Qwen/Qwen3-30B-A3B-Instruct-2507-FP8": ("Qwen3-30B-A3B", Quantization("fp8_w8a8", (128, 128))),
    "Qwen3-235B-A22B-Instruct-2507-FP8": ("Qwen3-235B-A22B", Quantization("fp8_w8a8", (128, 128))),
    "unsloth/Qwen3-30B-A3B": ("Qwen3-30B-A3B", Quantization()),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ("Mixtral-8x7B", Quantization()),
    "TheBloke/Mixtral-8x7B-Instruct-v0.1-AWQ": ("Mixtral-8x7B", Quantization("int4_w4a16", (0, 128))),
    "Qwen/Qwen3-30B-A3B-GPTQ-Int4": ("Qwen3-30B-A3B", Quantization("int4_w4a16", (0, 128))),
    "someone/Qwen3-30B-A3B-quantized.w4a16": ("Qwen3-30B-A3B", Quantization("int4_w4a16", (0, 128))),
    "RedHatAI/GLM-4.7-Flash-FP8-dynamic": ("GLM-4.7-Flash", Quantization("fp8_w8a8", per_channel=True)),
    "zai-org/GLM-4.5-Air-FP8": ("GLM-4.5-Air", Quantization("fp8_w8a8", per_channel=True)),
    "zai-org/GLM-4.6-FP8": ("GLM-4.6", Quantization("fp8_w8a8", per_channel=True)),
    "deepseek-ai/DeepSeek-V3-0324": ("DeepSeek-V3", Quantization("fp8_w8a8", (128, 128))),
    "deepseek-ai/DeepSeek-R1-0528": ("DeepSeek-R1", Quantization("fp8_w8a8", (128, 128))),
    "deepseek-ai/DeepSeek-V2-Lite-Chat": ("DeepSeek-V2-Lite", Quantization()),
    "moonshotai/Kimi-K2-Instruct-0905": ("Kimi-K2-Instruct", Quantization("fp8_w8a8", (128, 128))),
    "meta-llama/Llama-4-Scout-17B-16E": ("Llama-4-Scout", Quantization()),
    "QuantTrio/GLM-4.6-AWQ": ("GLM-4.6", Quantization("int4_w4a16", (0, 128))),
    "Intel/Qwen3-30B-A3B-Instruct-2507-int4-AutoRound": ("Qwen3-30B-A3B", Quantization("int4_w4a16", (0, 128))),
    "cpatonn/Qwen3-Coder-30B-A3B-Instruct-AWQ-4bit": ("Qwen3-Coder-30B-A3B", Quantization("int4_w4a16", (0, 128))),
    "Qwen/Qwen3-Next-80B-A3B-Thinking-FP8": ("Qwen3-Next-80B-A3B", Quantization("fp8_w8a8", (128, 128))),
    "unsloth/gpt-oss-20b-BF16": ("gpt-oss-20b", Quantization()),
    "Qwen3 30B A3B": ("Qwen3-30B-A3B", Quantization()),
    "allenai/OLMoE-1B-7B-0125-Instruct": ("OLMoE-1B-7B", Quantization()),
}


@pytest.mark.parametrize(("name", "meant"), SUFFIXES.items(), ids=SUFFIXES.keys())
def test_a_checkpoints_name_means_the_built_in_model_in_the_quantization_that_it_says(
    name: str, meant: tuple[str, Quantization]
) -> None:
    model, known = resolve(name), builtin_models()[meant[0]]

    assert model.quantization == meant[1]
    assert (model.architecture, model.routed_experts, model.top_k, model.hidden_size, model.intermediate_size) == (
        known.architecture,
        known.routed_experts,
        known.top_k,
        known.hidden_size,
        known.intermediate_size,
    )


def test_what_was_concluded_from_a_name_is_said() -> None:
    match = match_name("unsloth/Qwen3-30B-A3B-Instruct-2507")

    assert isinstance(match, NameMatch)
    assert not match.is_exact
    assert "has the experts of the built-in Qwen3-30B-A3B by its name" in match.note
    assert "config.json was not read" in match.note


@pytest.mark.parametrize(
    "name",
    ["Qwen3-30B-A3B-Pruned", "DeepSeek-R1-Distill-Qwen-32B", "Qwen3-30B", "Mixtral-8x7B-Instruct-v0.1-FP8"],
)
def test_a_name_that_says_more_than_suffixes_is_no_built_in_model(name: str) -> None:
    assert match_name(name) is None


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("unsloth/Qwen3-30B-A3B-GGUF", "GGUF"),
        ("nvidia/Qwen3-30B-A3B-NVFP4", "NVFP4"),
        ("mlx-community/Qwen3-30B-A3B-4bit", "MLX"),
        ("unsloth/Qwen3-30B-A3B-bnb-4bit", "bitsandbytes"),
        ("openai/gpt-oss-120b", "MXFP4"),
        ("nvidia/DeepSeek-R1-0528-FP4", "NVFP4"),
    ],
)
def test_a_format_that_runs_no_triton_kernel_is_refused_by_its_name(name: str, stored: str) -> None:
    message = refusal(name)

    assert f" in {stored}, whose experts do not run the fused Triton kernel" in message
    assert "no table is read" in message


def test_a_config_tells_how_many_layers_have_experts(tmp_path: Path) -> None:
    stated = {"num_hidden_layers": 27, "first_k_dense_replace": 1}

    assert resolve(checkpoint(tmp_path, MIXTRAL | stated)).moe_layers == 26
    assert resolve(checkpoint(tmp_path, MIXTRAL)).moe_layers is None


def test_a_model_that_nobody_published_in_fp8_is_not_found_so() -> None:
    assert find_builtin("GLM-4.7-Flash") is not None
    assert find_builtin("GLM-4.7-Flash-FP8") is None


def test_no_two_built_in_models_share_a_name() -> None:
    names = [name for record in builtin_records() for name in {known.casefold() for known in record.names}]

    assert len(names) == len(set(names))


@pytest.mark.parametrize("model", builtin_models().values(), ids=builtin_models().keys())
def test_a_built_in_model_is_possible(model: MoEModel) -> None:
    assert 0 < model.top_k <= model.routed_experts
    assert model.hidden_size % 64 == 0
    assert model.intermediate_size % 16 == 0
    assert model.architecture.endswith(("ForCausalLM", "ForConditionalGeneration"))


def test_the_usual_quantization_of_a_built_in_model_is_its_first() -> None:
    for record in builtin_records():
        assert record.model.quantization == record.quantizations[0]


def test_an_unknown_name_brings_the_closest_built_in_ones() -> None:
    assert "GLM-4.7-Flash" in refusal("GLM-4.7-Flsh")


ODD_NAMES = [
    "",
    " ",
    "a/b/c",
    "no\nsuch",
    "\x00",
    "x" * 5000,
    "\udcff",
    "./missing",
    "/missing/config.json",
    "org/",
    "~",
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_an_odd_name_is_refused_in_one_line(name: str) -> None:
    assert "--shape" in refusal(name)


def test_a_hub_that_cannot_be_reached_leaves_a_way_on(offline: None) -> None:
    message = refusal("org/unheard-of")

    assert "ConnectionError" in message
    assert "--shape" in message


def test_a_hub_that_does_not_answer_is_given_up_within_two_seconds_with_the_nearest_names(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    monkeypatch.setattr(hub, "urlopen", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    message = refusal("org/Qwen3-30B-A3X")

    assert time.monotonic() - started < 2
    assert "Qwen3-30B-A3B" in message
    assert "does not answer" in message
    assert capfd.readouterr() == ("", "")


def test_a_file_in_the_hubs_cache_needs_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, MIXTRAL)
    monkeypatch.setattr(hub, "answers", lambda within_s: pytest.fail("the hub was asked"))
    cached = {"config.json": str(tmp_path / "config.json"), "hf_quant_config.json": str(tmp_path / "config.json")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda hub_id, name: cached[name])

    assert resolve("org/unheard-of").top_k == 2


def test_the_hub_without_transformers_leaves_a_way_on(without_transformers: None) -> None:
    assert "pip install transformers" in refusal("org/unheard-of")


def test_the_hub_serves_what_its_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: None) -> None:
    checkpoint(tmp_path, MIXTRAL, hf_quant_config={"quantization": {"quant_algo": "FP8"}})
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda hub_id, name: str(tmp_path / name))

    model = resolve("org/unheard-of")

    assert (model.name, model.top_k, model.quantization) == ("org/unheard-of", 2, Quantization("fp8_w8a8"))


def test_a_file_that_the_hub_need_not_have_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: None
) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    checkpoint(tmp_path, MIXTRAL)

    def fetch(hub_id: str, name: str) -> str:
        if name != "config.json":
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)

    assert resolve("org/unheard-of").quantization == Quantization()


def test_the_consent_to_remote_code_reaches_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, *, trust_remote_code: bool) -> object:
        asked.append((path, trust_remote_code))
        return MIXTRAL

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", load)
    folder = checkpoint(tmp_path, {"model_type": "own"})
    resolve(folder)
    resolve(folder, trust_remote_code=True)

    assert asked == [(folder, False), (folder, True)]


def test_importing_shapes_loads_neither_torch_nor_transformers() -> None:
    heavy = {"torch", "transformers", "huggingface_hub"}
    code = f"import sys, sglang_moe_ext.models; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout.strip() == "[]"


def test_transformers_speaks_as_loudly_as_before(tmp_path: Path) -> None:
    from transformers.utils import logging

    from sglang_moe_ext.models.resolve import config_of_class

    before = logging.get_verbosity()
    config_of_class(checkpoint(tmp_path, MIXTRAL), trust_remote_code=False)

    assert logging.get_verbosity() == before


SHAPES: dict[str, tuple[str, MoEShape]] = {
    "the four sizes": ("E=65,N=1536,K=2048,topk=5", MoEShape(65, 1536, 2048, 5)),
    "in another order, with spaces": (" topk = 5 , K=2048, N=1536 ,E=65 ", MoEShape(65, 1536, 2048, 5)),
    "in blocks": (
        "E=257,N=256,K=7168,topk=9,dtype=fp8_w8a8,block_shape=[128, 128]",
        MoEShape(257, 256, 7168, 9, Quantization("fp8_w8a8", (128, 128))),
    ),
    "per channel": (
        "E=65,N=1536,K=2048,topk=5,dtype=fp8_w8a8,per_channel_quant=True",
        MoEShape(65, 1536, 2048, 5, Quantization("fp8_w8a8", per_channel=True)),
    ),
    "in groups": (
        "block_shape=[0,128],dtype=int4_w4a16,E=8,N=64,K=64,topk=2",
        MoEShape(8, 64, 64, 2, Quantization("int4_w4a16", (0, 128))),
    ),
    "without a gate": (
        "E=128,N=1856,K=2688,topk=6,gated=False",
        MoEShape(128, 1856, 2688, 6, gated=False),
    ),
    "in float16": ("E=8,N=64,K=64,topk=2,dtype=float16", MoEShape(8, 64, 64, 2, dtype="float16")),
}


@pytest.mark.parametrize(("text", "expected"), SHAPES.values(), ids=SHAPES.keys())
def test_a_stated_shape_is_read(text: str, expected: MoEShape) -> None:
    assert parse_shape(text) == expected


WRONG_SHAPES: dict[str, tuple[str, str]] = {
    "nothing": ("", "expected the like of"),
    "a field missing": ("E=65,N=1536,K=2048", "no topk"),
    "an unknown field": ("E=65,N=1536,K=2048,topk=5,M=1", "unknown field 'M'"),
    "a field twice": ("E=65,N=1536,K=2048,topk=5,e=65", "stated twice"),
    "zero": ("E=0,N=1536,K=2048,topk=5", "E='0'"),
    "negative": ("E=65,N=-1,K=2048,topk=5", "N='-1'"),
    "a fraction": ("E=65,N=1.5,K=2048,topk=5", "N='1.5'"),
    "huge": ("E=65,N=99999999999,K=2048,topk=5", "N="),
    "digits of another script": ("E=٦٥,N=1536,K=2048,topk=5", "E="),
    "more experts per token than experts": ("E=4,N=64,K=64,topk=5", "topk=5 of E=4"),
    "an unknown dtype": ("E=65,N=1536,K=2048,topk=5,dtype=fp4", "unknown dtype"),
    "a broken block": ("E=65,N=1536,K=2048,topk=5,dtype=fp8_w8a8,block_shape=[128]", "block_shape="),
    "an open bracket": ("E=65,N=1536,K=2048,topk=5,block_shape=[128,128", "cannot read"),
    "blocks without a dtype": ("E=65,N=1536,K=2048,topk=5,block_shape=[128,128]", "no scales"),
    "neither yes nor no": ("E=65,N=1536,K=2048,topk=5,gated=maybe", "True or False"),
    "no value": ("E,N=1536", "cannot read"),
    "a line break": ("E=65\nN=2", "E="),
}


@pytest.mark.parametrize(("text", "complaint"), WRONG_SHAPES.values(), ids=WRONG_SHAPES.keys())
def test_a_wrong_shape_is_refused_in_one_line(text: str, complaint: str) -> None:
    with pytest.raises(ModelError) as refused:
        parse_shape(text)
    assert complaint in str(refused.value)
    assert str(refused.value).isprintable()


@settings(max_examples=examples(100))
@given(text=st.one_of(st.text(max_size=40), st.text(alphabet="ENKtopkdtype=[],0123 _", max_size=40)))
def test_any_text_for_a_shape_is_refused_in_one_line(text: str) -> None:
    try:
        parse_shape(text)
    except ModelError as refused:
        assert str(refused).isprintable()


@settings(max_examples=examples(50))
@given(
    sizes=st.tuples(st.integers(8, 1 << 20), st.integers(1, 1 << 20), st.integers(1, 1 << 20), st.integers(1, 8)),
    order=st.permutations(range(4)),
)
def test_a_shape_is_read_back_in_any_order(sizes: tuple[int, int, int, int], order: list[int]) -> None:
    fields = [f"{name}={size}" for name, size in zip(("E", "N", "K", "topk"), sizes, strict=True)]

    assert parse_shape(",".join(fields[at] for at in order)) == MoEShape(*sizes)
