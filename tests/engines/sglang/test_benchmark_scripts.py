"""The patch of upstream's `get_model_config`, and the hook that brings it there, against stand-ins of our own.

Upstream's common_utils.py lies in its source tree alone, in no package index, and is not ours to commit. The stand-ins
keep its contract: names among the constants, a Mixtral otherwise. The real file was read at 00f0b462 and 851a8517, and
its get_model_config run by hand with SGLang 0.5.23 and transformers 5.12.1 on 2026-11-21: Ernie4_5_Moe and LongcatFlash
raised and are answered in all keys; Glm4MoeLite, which 851a8517 took for E=64 with 2N=10240 at TP 2, is E=65 with 1536;
Qwen3Moe, Mixtral, GptOss and Olmoe are answered as before.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_moe_ext import env
from sglang_moe_ext.engines.sglang import benchmark_scripts, installation
from tests.engines.installed import REPO_ROOT

PTH = REPO_ROOT / "packaging" / "sglang_moe_ext_startup.pth"

NEW = """
import json
def get_model_config(model_name, tp_size, ep_size=1, disable_shared_experts_fusion=False, topk_ids_dir=None):
    with open(model_name + "/config.json") as file:
        config = json.load(file)
    if config["architectures"][0] in ["NamedForCausalLM", "AnotherForCausalLM"]:
        experts = -1
    else:
        experts = config["num_local_experts"]
    return {
        "num_experts": experts, "topk": config["num_experts_per_tok"], "hidden_size": config["hidden_size"],
        "shard_intermediate_size": 2 * config["intermediate_size"] // tp_size, "dtype": "theirs",
        "block_shape": "theirs", "architecture": config["architectures"][0], "num_layers": 5, "dense_layers": 0,
    }
"""
OLD = """
def get_model_config(model_name, tp_size):
    known = "NamedForCausalLM"
    raise AttributeError("no num_local_experts\\nin " + known)
"""
SIZES = {"hidden_size": 512, "intermediate_size": 4096, "moe_intermediate_size": 256, "num_experts": 64}
SIZES |= {"num_experts_per_tok": 4, "n_shared_experts": 1, "num_hidden_layers": 3, "first_k_dense_replace": 1}


def function(source: str) -> Any:
    names: dict[str, Any] = {}
    exec(source, names)
    return names["get_model_config"]


def breaks(*_: object) -> None:
    raise RuntimeError("broken")


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "find", lambda: None)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    def written(architecture: str, **fields: object) -> str:
        config = {"architectures": [architecture], **SIZES, **fields}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return str(tmp_path)

    return written


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("NamedForCausalLM", {}),
        ("MixtralForCausalLM", {"num_local_experts": 7}),
        ("UnnamedForCausalLM", {"num_local_experts": 64, "moe_intermediate_size": 4096}),
    ],
    ids=["named", "a Mixtral, which nobody names", "not named, sizes agree"],
)
def test_what_upstream_answers_right_stays_its_answer(model: Any, architecture: str, fields: dict[str, int]) -> None:
    folder = model(architecture, **fields)
    assert benchmark_scripts.patch(function(NEW))(folder, 2) == function(NEW)(folder, 2)


def test_where_upstream_raises_we_answer_in_its_layout(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model("UnnamedForCausalLM", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(benchmark_scripts, "config_of_class", lambda *_, **__: config)
    assert benchmark_scripts.patch(function(NEW))(folder, 2) == {
        "num_experts": 64,
        "topk": 4,
        "hidden_size": 512,
        "shard_intermediate_size": 256,
        "dtype": torch.bfloat16,
        "block_shape": [128, 128],
        "architecture": "UnnamedForCausalLM",
        "num_layers": 3,
        "dense_layers": 1,
    }


def test_a_silently_wrong_width_is_corrected_and_the_rest_stays_upstreams(model: Any) -> None:
    folder = model("UnnamedForCausalLM", num_local_experts=64)
    wrong = function(NEW)(folder, 2)
    assert benchmark_scripts.patch(function(NEW))(folder, 2) == {**wrong, "shard_intermediate_size": 256}


@pytest.mark.parametrize(
    ("disabled", "ids", "expected"),
    [(False, None, (65, 4)), (False, "ids", (65, 5)), (True, None, (64, 4)), (True, "ids", (64, 4))],
    ids=["fused", "fused, recorded ids", "not fused", "not fused, recorded ids"],
)
def test_a_fused_expert_is_among_the_topk_of_recorded_ids_only(
    model: Any, disabled: bool, ids: str | None, expected: tuple[int, int]
) -> None:
    answer = benchmark_scripts.patch(function(NEW))(model("Glm4MoeLiteForCausalLM"), 1, 1, disabled, topk_ids_dir=ids)
    assert (answer["num_experts"], answer["topk"]) == expected


def test_a_version_with_two_parameters_gets_no_keys_that_it_does_not_know(model: Any) -> None:
    answer = benchmark_scripts.patch(function(OLD))(model("UnnamedForCausalLM"), tp_size=2)
    assert not answer.keys() & benchmark_scripts.LAYERS.keys()
    assert answer["shard_intermediate_size"] == 256


def test_an_answer_of_ours_is_one_line_in_the_log(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        benchmark_scripts.patch(function(OLD))(model("UnnamedForCausalLM"), 2)
    (line,) = (line for message in caplog.messages for line in message.splitlines())
    assert line.startswith("sglang-moe-ext answers for UnnamedForCausalLM")


def test_upstream_answers_where_our_resolver_fails(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model("UnnamedForCausalLM", num_local_experts=64)
    monkeypatch.setattr(benchmark_scripts, "resolve", breaks)
    assert benchmark_scripts.patch(function(NEW))(folder, 2) == function(NEW)(folder, 2)


def test_upstreams_error_is_the_users_where_we_have_no_answer(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="no num_local_experts"):
        benchmark_scripts.patch(function(OLD))(str(tmp_path), 2)


def test_a_function_that_names_no_architecture_is_left_alone() -> None:
    upstream = function("def get_model_config(model_name, tp_size): return ask(model_name)")
    assert benchmark_scripts.patch(upstream) is upstream


def start(site: Path, code: str, *, package: Path = REPO_ROOT, switch: str = "") -> tuple[str, str]:
    """Both streams of a bare Python that read our .pth file in `site`, has `package` on its path, and ran `code`."""
    (site / PTH.name).write_bytes(PTH.read_bytes())
    (site / "a_package.pth").write_text(f"{package}\n", encoding="utf-8")
    begin = f"import site, sys; before = set(sys.modules); site.addsitedir({str(site)!r}); "
    command = [sys.executable, "-I", "-S", "-c", begin + code]
    done = subprocess.run(command, capture_output=True, text=True, env={env.DISABLE: switch}, check=True)
    return done.stdout, done.stderr


OTHER = "def get_model_config(model_name, tp_size): return {}"
ANOTHER = "def get_model_config(path):\n    return 'NamedForCausalLM'"


@pytest.mark.parametrize(
    ("folder", "source", "before", "switch", "hooked"),
    [
        ("fused_moe_triton", NEW, "", "", True),
        ("copied", NEW, "", "", True),
        ("copied", OTHER, "", "", False),
        ("copied", ANOTHER, "", "", False),
        ("fused_moe_triton", NEW, "", "1", False),
        ("fused_moe_triton", NEW, f"sys.modules[{benchmark_scripts.__name__!r}] = None; ", "", False),
    ],
    ids=[
        "upstream's script",
        "a copy elsewhere",
        "names no architecture",
        "other parameters",
        "switched off",
        "our patch is broken",
    ],
)
def test_upstreams_function_alone_is_patched_in_whatever_folder(
    tmp_path: Path, folder: str, source: str, before: str, switch: str, hooked: bool
) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "common_utils.py").write_text(source, encoding="utf-8")
    asked = "import common_utils; print(hasattr(common_utils.get_model_config, '__wrapped__'))"
    code = f"{before}sys.path.insert(0, {str(tmp_path / folder)!r}); {asked}"
    assert start(tmp_path, code, switch=switch)[0] == f"{hooked}\n"


LAYER = "vllm/model_executor/layers/fused_moe/fused_moe.py"
"""A stand-in for the engine's layer, which both engines' scripts import first."""
SCRIPT = """
import argparse
from vllm.model_executor.layers.fused_moe import fused_moe
{helper}
if __name__ == "__main__":
    argparse.ArgumentParser().parse_args([])
    print(hasattr({function}, "__wrapped__"))
"""
PARAMS = "def get_model_params(config):\n    return (1, 1, 1, 1) if config == 'DbrxForCausalLM' else None"


@pytest.mark.parametrize(
    ("helper", "files", "function", "patched"),
    [
        (PARAMS, {}, "get_model_params", True),
        ("from shapes import get_model_config", {"shapes.py": NEW}, "get_model_config", True),
        ("from shapes import get_model_config", {"shapes.py": OTHER}, "get_model_config", False),
        ("import shapes\nget_model_params = len", {"shapes.py": PARAMS}, "shapes.get_model_params", False),
    ],
    ids=["vLLM's script itself", "a helper of another name", "another function", "a name that means another one"],
)
def test_a_script_that_runs_has_its_functions_patched_when_it_parses_its_arguments(
    tmp_path: Path, helper: str, files: dict[str, str], function: str, patched: bool
) -> None:
    layer = tmp_path / LAYER
    layer.parent.mkdir(parents=True)
    for parent in layer.relative_to(tmp_path).parents:
        (tmp_path / parent / "__init__.py").touch()
    layer.touch()
    (tmp_path / "__init__.py").unlink()
    for name, source in files.items():
        (tmp_path / name).write_text(source, encoding="utf-8")
    script = tmp_path / "my_benchmark.py"
    script.write_text(SCRIPT.format(helper=helper, function=function), encoding="utf-8")
    (tmp_path / PTH.name).write_bytes(PTH.read_bytes())
    (tmp_path / "a_package.pth").write_text(f"{REPO_ROOT}\n", encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(tmp_path)!r})\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(REPO_ROOT)))}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == f"{patched}\n", done.stderr


def test_a_start_loads_nothing_but_the_hook(tmp_path: Path) -> None:
    loaded = "sorted(name for name in set(sys.modules) - before if not name.startswith('encodings'))"
    ours = ["sglang_moe_ext", "sglang_moe_ext.env", "sglang_moe_ext.import_hook", "sglang_moe_ext.startup"]
    assert start(tmp_path, f"print({loaded})") == (f"{ours}\n", "")


@pytest.mark.parametrize("init", [None, "", "raise RuntimeError", "def"], ids=["gone", "half gone", "raises", "broken"])
def test_a_damaged_installation_says_nothing_at_start(tmp_path: Path, init: str | None) -> None:
    if init is not None:
        (tmp_path / "sglang_moe_ext").mkdir()
        (tmp_path / "sglang_moe_ext" / "__init__.py").write_text(init, encoding="utf-8")
    assert start(tmp_path, "print('started')", package=tmp_path) == ("started\n", "")
