"""Every MoE config class of transformers resolves, to the sizes of the expert weights that transformers makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ENGINES = Path(os.environ.get("SGLANG_MOE_EXT_ENGINES", REPOSITORY / ".engines"))
INSTALLED = "installed"
NEWEST = "transformers-newest"

NOT_SERVED = {
    "doge": "its experts are rows of an embedding, no fused MoE",
    "dots3_note_vision_encoder": "a vision tower by itself, with another number of experts in each layer",
    "nllb-moe": "translation model with top-2 routing wired in: no engine serves it",
    "switch_transformers": "encoder-decoder with top-1 routing wired in: no engine serves it",
}
LEFT_OPEN = {
    "deepseek_ocr2": "num_experts_per_tok is None by default",
    "deepseek_ocr2_text": "num_experts_per_tok is None by default",
    "deepseek_v2": "num_experts_per_tok is None by default",
}
DENSE_BY_DEFAULT = {
    "diffusion_gemma": "num_experts is None by default",
    "diffusion_gemma_text": "num_experts is None by default",
    "dots1": "n_routed_experts is None by default",
    "gemma4": "num_experts is None by default",
    "gemma4_text": "num_experts is None by default",
    "hunyuan_v1_moe": "num_experts is 1 by default",
    "vitpose": "num_experts is 1 by default",
    "vitpose_backbone": "num_experts is 1 by default",
}
NO_STACKED_WEIGHTS = {
    "aria": "AriaExperts split their weights over modules of their own in 5.12",
    "aria_text": "AriaExperts split their weights over modules of their own in 5.12",
    "dbrx": "w1 is [experts * width, hidden], built from two configs",
    "ernie4_5_vl_moe": "its module is built once for text and once for images",
    "ernie4_5_vl_moe_text": "its module is built once for text and once for images",
    "granitemoe": "its experts take sizes, not a config, in 5.12",
    "granitemoehybrid": "its experts take sizes, not a config, in 5.12",
    "granitemoeshared": "its experts take sizes, not a config, in 5.12",
    "jetmoe": "JetMoeParallelExperts takes sizes, not a config",
}

SURVEY = '''
import importlib, inspect, json, re, sys, tempfile, warnings
from dataclasses import asdict

warnings.filterwarnings("ignore")
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sglang_moe_ext.core import ModelError
from sglang_moe_ext.models import from_config, resolve

transformers.logging.set_verbosity_error()
COUNT = re.compile(r"(?!.*shared).*experts$")


def configs(config):
    yield config
    for part in vars(config).values():
        if isinstance(part, transformers.PretrainedConfig):
            yield from configs(part)


def counts(config):
    """Whether a field that counts experts exists, and is above 1."""
    stated = [value for part in configs(config) for key, value in part.to_dict().items() if COUNT.match(key)]
    return [value for value in stated if not isinstance(value, (dict, str))]


def weights(config):
    """[experts, both sizes of the down projection, gated] of each class of stacked experts."""
    found = []
    for part in configs(config):
        name = type(part).__module__.replace("configuration_", "modeling_")
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        for label, kind in vars(module).items():
            if not (inspect.isclass(kind) and kind.__module__ == name and label.endswith(("Experts", "NaiveMoe"))):
                continue
            try:
                with torch.device("meta"):
                    stacked = dict(kind(part).named_parameters())
            except (AttributeError, TypeError, RuntimeError):
                continue
            if "down_proj" in stacked:
                experts, *sizes = stacked["down_proj"].shape
                found.append([experts, sorted(sizes), "gate_up_proj" in stacked or "gate_proj" in stacked])
    return found


def numbers(model):
    kept = asdict(model)
    del kept["moe_layers"], kept["decoder"]  # read from a folder's config alone
    del kept["name"], kept["source"]
    return kept


def saved(config):
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return numbers(resolve(folder))


survey = {}
for model_type in CONFIG_MAPPING:
    try:
        config = CONFIG_MAPPING[model_type]()
        stated = counts(config)
    except Exception:
        continue
    row = survey[model_type] = {"counts": bool(stated), "moe": any(isinstance(n, list) or (n or 0) > 1 for n in stated)}
    try:
        row["model"] = numbers(from_config(config, name=model_type, source=model_type))
        row["of_dict"] = numbers(from_config(config.to_dict(), name=model_type, source=model_type))
        row["of_folder"] = saved(config)
        row["weights"] = weights(config)
    except ModelError as error:
        row["error"] = str(error)
json.dump({"version": transformers.__version__, "survey": survey}, open(sys.argv[1], "w"))
'''


@pytest.fixture(scope="module")
def surveys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[str], Path]]]:
    """One process for each transformers that is here, all at work at once."""
    started = {}
    for version in (INSTALLED, NEWEST):
        if version == NEWEST and not (ENGINES / NEWEST / "transformers").is_dir():
            continue
        folder = tmp_path_factory.mktemp(version)
        path = os.pathsep.join([str(REPOSITORY)] if version == INSTALLED else [str(ENGINES / NEWEST), str(REPOSITORY)])
        process = subprocess.Popen(
            [sys.executable, "-c", SURVEY, str(folder / "survey.json")],
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started[version] = (process, folder / "survey.json")
    yield started
    for process, _ in started.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="module", params=[INSTALLED, NEWEST])
def survey(
    request: pytest.FixtureRequest, surveys: dict[str, tuple[subprocess.Popen[str], Path]]
) -> dict[str, dict[str, Any]]:
    """For each model type that can be made without arguments: does it count experts, and what does it resolve to."""
    if request.param not in surveys:
        pytest.skip(f"no {ENGINES / NEWEST}: pip install --no-deps --target it the newest transformers and tokenizers")
    process, answer = surveys[request.param]
    _, complaints = process.communicate(timeout=300)
    assert process.returncode == 0, complaints[-2000:]
    surveyed: dict[str, dict[str, Any]] = json.loads(answer.read_text())["survey"]
    return surveyed


def resolved(survey: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {model_type: row for model_type, row in survey.items() if "model" in row}


def present(expected: dict[str, str], survey: dict[str, dict[str, Any]]) -> set[str]:
    return set(expected) & set(survey)


def test_every_class_that_counts_experts_resolves_unless_a_reason_is_given(survey: dict[str, dict[str, Any]]) -> None:
    moe = {model_type for model_type, row in survey.items() if row["moe"]}

    assert len(moe) > 40
    assert moe - set(resolved(survey)) == present(NOT_SERVED | LEFT_OPEN, survey)


def test_a_class_that_counts_no_experts_by_default_is_called_dense(survey: dict[str, dict[str, Any]]) -> None:
    dense = {model_type: row for model_type, row in survey.items() if row["counts"] and not row["moe"]}

    assert set(dense) == present(DENSE_BY_DEFAULT, survey)
    assert all("a dense model" in row["error"] for row in dense.values())


def test_no_class_without_experts_resolves(survey: dict[str, dict[str, Any]]) -> None:
    assert [model_type for model_type, row in resolved(survey).items() if not row["moe"]] == []


def test_a_field_that_a_class_leaves_open_is_named_in_the_error(survey: dict[str, dict[str, Any]]) -> None:
    for model_type in present(LEFT_OPEN, survey):
        assert "no number of experts per token" in survey[model_type]["error"]


def test_the_sizes_are_those_of_the_expert_weights_in_transformers(survey: dict[str, dict[str, Any]]) -> None:
    wrong = {
        model_type: (row["model"], row["weights"])
        for model_type, row in resolved(survey).items()
        if row["weights"] and as_weights(row["model"]) not in row["weights"]
    }

    assert wrong == {}


def as_weights(model: dict[str, Any]) -> list[Any]:
    return [model["routed_experts"], sorted((model["intermediate_size"], model["hidden_size"])), model["gated"]]


def test_only_classes_with_a_reason_have_no_weights_to_compare_with(survey: dict[str, dict[str, Any]]) -> None:
    unchecked = {model_type for model_type, row in resolved(survey).items() if not row["weights"]}

    assert unchecked <= set(NO_STACKED_WEIGHTS)


@pytest.mark.parametrize("route", ["of_dict", "of_folder"])
def test_an_object_its_dict_and_its_saved_folder_resolve_alike(survey: dict[str, dict[str, Any]], route: str) -> None:
    differ = {
        model_type: (row["model"], row.get(route, row.get("error")))
        for model_type, row in resolved(survey).items()
        if row.get(route) != row["model"]
    }

    assert differ == {}
