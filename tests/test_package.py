"""The wheel: what lies in it, what it asks for, and what its entry points do."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.engines.installed import engine_environment

REPO_ROOT = Path(__file__).resolve().parents[1]
NEVER_MOVED = {"torch", "triton", "transformers", "sglang", "vllm", "numpy"}
HEAVY = {"torch", "triton", "transformers", "rich", "numpy"}
ATTACHED = {
    "": "core engines env few_tokens_config gpu import_hook kernel_plans package_data schemes serving startup tables "
    "untrusted",
    "engines.": "backend_answer config_dict few_tokens_layer installed_engines launch_rules launch_shape lookup_args "
    "running_engine sglang table_names tensors weight_only",
    "engines.sglang.": "deferred_sort hook_points installation kernel_sequence support table_names",
    "gpu.": "amd_specs shared_memory specs",
    "serving.": "attach guard kernel_selection launch_guard plugin sglang_hooks sglang_lookup_hook table_search "
    "table_selection",
    "tables.": "config_table files plan_table provenance user_store",
}
"""By package, the modules of ours that a server has once its engine's layer is hooked."""
ATTACH = """
import site, sys
site.addsitedir("packaging")
from importlib import import_module
import_module("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe")
from sglang_moe_ext.serving import attach
assert attach.state().is_active, attach.state()
print(*sorted(name for name in sys.modules if name.partition(".")[0] == "sglang_moe_ext"), sep=chr(10))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    subprocess.run(command, cwd=REPO_ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_installing_beside_an_engine_moves_nothing(wheel: Path, tmp_path: Path) -> None:
    assert {"torch", "triton", "transformers"} <= {d.name for d in importlib.metadata.distributions()}
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", report, str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    installed = {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}
    assert installed <= {"sglang-moe-ext"}
    assert not installed & NEVER_MOVED


def test_the_wheel_asks_for_nothing_but_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert all("extra ==" in line for line in required)


@pytest.mark.parametrize(
    "name",
    [
        "sglang_moe_ext_startup.pth",
        "sglang_moe_ext/py.typed",
        "sglang_moe_ext/models/models.json",
        "sglang_moe_ext/report/page.html",
        "sglang_moe_ext/_docs/index.md",
    ],
    ids=["startup file", "type marker", "model facts", "page of a report", "documentation"],
)
def test_the_wheel_carries(wheel: Path, name: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert name in archive.namelist()


def test_the_source_distribution_carries_documentation_and_tests(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", tmp_path]
    subprocess.run(command, cwd=REPO_ROOT, check=True, capture_output=True)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CONTRIBUTING.md", "docs/index.md", "docs/benchmarks/tuning.md", "tests/conftest.py"} <= names


def test_the_metadata_name_every_supported_python_and_no_placeholder(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    classifiers = [line.rpartition(" :: ")[2] for line in metadata.splitlines() if "Python :: 3." in line]
    assert classifiers == ["3.10", "3.11", "3.12", "3.13"]
    assert "example.com" not in metadata and "TODO" not in metadata


def test_the_wheel_carries_no_tests_and_names_its_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith("tests/")]
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        entry_points = archive.read(name).decode()
    assert "sglang_moe_ext = sglang_moe_ext.serving.plugin:register_sglang" in entry_points
    assert "sglang_moe_ext = sglang_moe_ext.serving.plugin:register_vllm" in entry_points
    assert "sglang-moe-ext = sglang_moe_ext.cli.main:main" in entry_points


def test_a_fresh_environment_without_torch_gets_help_and_one_line_errors(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-index", wheel], check=True, capture_output=True)
    help_text = subprocess.run(
        [python, "-m", "sglang_moe_ext.tune", "--help"], capture_output=True, text=True, check=True
    )
    assert "--from-log" in help_text.stdout
    command = [python, "-m", "sglang_moe_ext.tune", "--model", "GLM-4.7-Flash", "--gpu", "RTX_4090"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("error: no Triton is installed")
    assert "Traceback" not in failed.stderr


def loaded_by(code: str, **environment: str) -> list[str]:
    """What a Python that ran the code printed, a line each."""
    command, variables = [sys.executable, "-W", "ignore", "-c", code], {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO_ROOT, env=variables)
    return done.stdout.splitlines()


def test_a_way_in_loads_four_modules_of_ours_and_nothing_heavy() -> None:
    loaded = loaded_by(
        "import sys; before = set(sys.modules); import sglang_moe_ext.serving.plugin; "
        "print('\\n'.join(sorted(set(sys.modules) - before)))"
    )
    ours = {name for name in loaded if name.startswith("sglang_moe_ext")}
    # Where the startup file of an installation has run, it has loaded itself and these two.
    here_before = {"sglang_moe_ext", "sglang_moe_ext.env", "sglang_moe_ext.import_hook"}
    assert ours | here_before == here_before | {"sglang_moe_ext.serving", "sglang_moe_ext.serving.plugin"}
    assert not {name.partition(".")[0] for name in loaded} & HEAVY


def test_a_hooked_server_has_loaded_no_module_of_ours_but_these() -> None:
    expected = {"sglang_moe_ext"}
    expected |= {f"sglang_moe_ext.{package}{name}" for package, names in ATTACHED.items() for name in names.split()}
    engine = engine_environment("0.5.23")["PYTHONPATH"]
    loaded = loaded_by(ATTACH, PYTHONPATH=engine, SGLANG_MOE_EXT_DISABLE="", SGLANG_PLUGINS="")
    assert {name for name in loaded if name.startswith("sglang_moe_ext")} == expected


def test_the_table_of_models_in_the_documentation_is_what_the_code_says() -> None:
    command = [sys.executable, "-m", "tools.model_table", "--check"]
    environment = {"PYTHONPATH": str(REPO_ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


PUBLIC = {
    "sglang_moe_ext.startup": ["install"],
    "sglang_moe_ext.tune": ["main"],
    "sglang_moe_ext.export": ["main"],
    "sglang_moe_ext.api": ["resolve", "predict", "measure", "lookup", "install"],
    "sglang_moe_ext.cli.main": ["main"],
    "sglang_moe_ext.serving.plugin": ["register_sglang", "register_vllm", "attach_patched"],
}
"""Addresses that the outside world has: the .pth file, pyproject's entry points, eight patches and users' scripts."""


@pytest.mark.parametrize(("module", "names"), PUBLIC.items(), ids=PUBLIC)
def test_a_public_address_stays(module: str, names: list[str]) -> None:
    assert all(callable(getattr(importlib.import_module(module), name)) for name in names)
