"""What an SGLang server says of itself becomes the flags of the layer that it runs."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import EngineError, ModelError, Parallelism
from sglang_moe_ext.engines.sglang import server_client, server_info
from sglang_moe_ext.engines.sglang.server_info import RunningServer
from tests.engines.installed import ENGINES_DIR

URL = "http://gpu-7:30000"
# Read off the real servers of 0.5.12 to 0.5.23; the arguments of 0.5.5 to 0.5.10 have the same names.
ANSWER = {
    "model_path": "Qwen/Qwen3-30B-A3B",
    "tp_size": 8,
    "ep_size": 2,
    "moe_dp_size": 1,
    "moe_runner_backend": "triton",
    "moe_a2a_backend": "none",
    "disable_shared_experts_fusion": False,
    "enable_deterministic_inference": False,
    "ep_num_redundant_experts": 0,
    "quantization": None,
    "device": "cuda",
    "version": "0.5.15",
}
VERSIONS = ("0.5.5", "0.5.8", "0.5.10", "0.5.12", "0.5.15", "0.5.18", "0.5.20", "0.5.23")


def parsed(**changes: Any) -> RunningServer:
    return server_info.parse(ANSWER | changes, URL)


def paths_of(version: str) -> set[str]:
    """The paths that the HTTP server of that release answers to a GET."""
    source = (ENGINES_DIR / "sglang" / version / "sglang/srt/entrypoints/http_server.py").read_text()
    return {
        argument.value
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.AsyncFunctionDef)
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "app.get"
        for argument in decorator.args
        if isinstance(argument, ast.Constant)
    }


def arguments_of(version: str) -> set[str]:
    """Every name that the server arguments of that release give a type."""
    srt = ENGINES_DIR / "sglang" / version / "sglang/srt"
    files = [srt / "server_args.py", *(srt / "arg_groups").glob("fields/*.py")]
    return {
        line.target.id
        for file in files
        for line in ast.walk(ast.parse(file.read_text()))
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_every_release_has_a_path_that_is_asked(version: str) -> None:
    assert paths_of(version) & set(server_info._PATHS)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_release_has_the_arguments_that_are_read(version: str) -> None:
    later = {"moe_dp_size"} if version in ("0.5.5", "0.5.8") else set()
    assert set(ANSWER) - {"version"} - later <= arguments_of(version)


def test_an_answer_becomes_the_flags_of_its_layer() -> None:
    assert server_info.flags(parsed(), {}) == {
        "model": "Qwen/Qwen3-30B-A3B",
        "shape": None,
        "from_log": None,
        "tp_size": 8,
        "ep_size": 2,
        "ep_num_redundant_experts": 0,
        "quantization": None,
        "disable_shared_experts_fusion": False,
        "moe_runner_backend": "triton",
        "enable_deterministic_inference": False,
    }


def test_ranks_that_have_experts_of_their_own_requests_do_not_split_them() -> None:
    assert parsed(moe_dp_size=4, ep_size=1).parallelism == Parallelism(tp=2, ep=1)


def test_an_answer_of_a_release_without_that_argument_splits_by_all_ranks() -> None:
    older = {name: value for name, value in ANSWER.items() if name != "moe_dp_size"}
    assert server_info.parse(older, URL).parallelism == Parallelism(tp=8, ep=2)


def test_a_users_dtype_comes_before_the_servers() -> None:
    flags = server_info.flags(parsed(quantization="fp8"), {"dtype": "int8_w8a8"})
    assert "dtype" not in flags and flags["quantization"] is None


def test_the_switches_of_the_server_are_kept() -> None:
    flags = server_info.flags(parsed(disable_shared_experts_fusion=True, enable_deterministic_inference=True), {})
    assert flags["disable_shared_experts_fusion"] and flags["enable_deterministic_inference"]


def test_a_path_of_another_machine_asks_for_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gpu-7:30000 serves .*nowhere, which .* add --model"):
        server_info.flags(parsed(model_path=str(tmp_path / "nowhere")), {})


def test_a_model_stands_for_a_path_of_another_machine(tmp_path: Path) -> None:
    there = parsed(model_path=str(tmp_path / "nowhere"))
    assert server_info.flags(there, {"model": "Qwen3-30B-A3B"})["model"] == "Qwen3-30B-A3B"


def test_a_path_that_both_machines_have_is_read(tmp_path: Path) -> None:
    assert server_info.flags(parsed(model_path=str(tmp_path)), {})["model"] == str(tmp_path)


@pytest.mark.parametrize(
    ("changes", "why"), [({"device": "cpu"}, "runs on cpu"), ({"moe_a2a_backend": "deepep"}, "deepep")], ids=str
)
def test_a_server_that_reads_no_table_is_said_to(changes: dict[str, str], why: str) -> None:
    reason = server_info.why_no_table(parsed(**changes))
    assert reason is not None and why in reason


def test_a_server_that_reads_tables_is_not_said_not_to() -> None:
    assert server_info.why_no_table(parsed()) is None


def test_another_release_is_named_with_the_one_that_is_here() -> None:
    (line,) = (line for line in server_info.report(parsed(), "0.5.23") if "0.5.23" in line)
    assert "0.5.15" in line


def test_that_nobody_knows_of_the_plugin_is_said() -> None:
    assert any("does not tell" in line and "log" in line for line in server_info.report(parsed(), "0.5.15"))


def test_a_release_without_entry_points_is_said_to_need_the_startup_file() -> None:
    assert any("the startup file alone" in line for line in server_info.report(parsed(version="0.5.10"), "0.5.10"))


@pytest.mark.parametrize(("url", "is_said"), [(URL, True), ("http://localhost:30000", False)], ids=["remote", "local"])
def test_the_gpu_of_another_machine_is_said_to_be_unknown(url: str, is_said: bool) -> None:
    lines = server_info.report(server_info.parse(ANSWER, url), "0.5.15")
    assert any("--gpu" in line for line in lines) is is_said


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"model_path": None}, "model_path=nothing"),
        ({"model_path": ""}, "model_path=''"),
        ({"tp_size": "8"}, "tp_size='8'"),
        ({"tp_size": 0}, "tp_size=0"),
        ({"tp_size": True}, "tp_size=True"),
        ({"moe_dp_size": 3}, "moe_dp_size 3"),
        ({"disable_shared_experts_fusion": "no"}, "disable_shared_experts_fusion='no'"),
        ({"version": 5}, "version=5"),
    ],
    ids=str,
)
def test_an_answer_that_is_not_an_sglang_servers_is_refused(changes: dict[str, Any], culprit: str) -> None:
    with pytest.raises(EngineError) as caught:
        parsed(**changes)
    assert culprit in str(caught.value) and URL in str(caught.value)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=3)


@given(st.dictionaries(st.sampled_from(sorted(ANSWER)), JSON))
def test_whatever_a_server_answers_costs_one_line(changes: dict[str, Any]) -> None:
    try:
        parsed(**changes)
    except EngineError as error:
        assert "\n" not in str(error)


def test_a_redirection_does_not_take_the_servers_key_along() -> None:
    asked = server_client.request("http://here/generate", "secret", {"text": "hello"})
    assert asked.unredirected_hdrs["Authorization"] == "Bearer secret"
    assert "Authorization" not in asked.headers
    assert asked.get_method() == "POST"
