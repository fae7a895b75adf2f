"""`sglang-moe-ext doctor --url`: what it makes of a server's answer, and of whatever else may answer there."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.cli import main
from sglang_moe_ext.core import TileConfig
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult, ProbeModule
from sglang_moe_ext.gpu import specs
from tests.engines.installed import ENGINES_DIR, REPO_ROOT
from tests.engines.sglang.test_server_info import ANSWER

VERSION = "0.5.23"
HERE = ("--gpu", "H200", "--batch-size", "1", "4096")
BUILTIN = ANSWER | {"model_path": "Qwen3-30B-A3B", "tp_size": 1, "ep_size": 1, "version": VERSION}


@dataclass
class Answers:
    """A server that answers each path with a status and a body, 404 the others, and remembers what it was sent."""

    url: str = ""
    bodies: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    keys: list[str | None] = field(default_factory=list)

    def says(self, document: object, path: str = "/server_info") -> None:
        self.bodies[path] = (200, json.dumps(document).encode())


@pytest.fixture(autouse=True)
def an_engine_and_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SGLang, without this machine's store, GPU and proxies."""
    site = ENGINES_DIR / "sglang" / VERSION
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", f"{REPO_ROOT}:{site}")
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("SGLANG_MOE_CONFIG_DIR", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(specs, "detect", lambda: None)


@pytest.fixture
def server() -> Iterator[Answers]:
    answers = Answers()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers.keys.append(self.headers["Authorization"])
            status, body = answers.bodies.get(self.path, (404, b"{}"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the base class's name
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        answers.url = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield answers
        listening.shutdown()
        thread.join()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[LookupRequest]:
    """Each question that would start an engine; the answer is always the same."""
    questions: list[LookupRequest] = []

    def ask(_: ProbeModule, question: LookupRequest) -> LookupResult:
        questions.append(question)
        taken = dict.fromkeys(question.tokens, TileConfig(16, 32, 64, 1, 4, 3))
        return LookupResult(VERSION, "3.7.1", "NVIDIA H200", taken, dict.fromkeys(taken), (), ())

    monkeypatch.setattr(ProbeModule, "ask", ask)
    return questions


Refusal = Callable[..., str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """The one line with which doctor refuses these arguments."""

    def said(*arguments: str) -> str:
        assert main.main(("doctor", *arguments)) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        return line

    return said


def test_the_layer_of_a_server_is_found_and_asked_for(server: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    server.says(BUILTIN)
    assert main.main(("doctor", "--json", "--url", server.url, *HERE)) == 0
    printed = capsys.readouterr()
    lines, document = printed.err.splitlines(), json.loads(printed.out)
    assert lines[0] == f"{server.url}: SGLang {VERSION} serves Qwen3-30B-A3B on cuda, --tp-size 1 --ep-size 1"
    assert document["server"] == {"url": server.url, "version": VERSION}
    (examined,) = document["examined"]
    assert examined["reads_tables"] is True
    assert {finding["M"] for finding in examined["findings"]} == {1, 4096}
    assert any("E=128,N=768,device_name=NVIDIA_H200.json" in file for file in examined["files"])


def test_an_older_server_is_asked_by_its_older_path(
    server: Answers, asked: list[LookupRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    server.says(BUILTIN | {"version": "0.5.5", "tp_size": 2}, "/get_server_info")
    assert main.main(("doctor", "--json", "--url", server.url + "/", *HERE)) == 0
    assert "SGLang 0.5.5 serves" in capsys.readouterr().err
    assert [question.shape.intermediate_size for question in asked] == [384]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"moe_runner_backend": "flashinfer_cutlass"}, "--moe-runner-backend flashinfer_cutlass reads no table"),
        ({"device": "cpu"}, "runs on cpu"),
    ],
    ids=["another backend", "a CPU"],
)
@pytest.mark.usefixtures("asked")
def test_a_server_that_reads_no_table_is_called_one(
    server: Answers, changes: dict[str, str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.says(BUILTIN | changes)
    assert main.main(("doctor", "--json", "--url", server.url, *HERE)) == 0
    printed = capsys.readouterr()
    (line,) = (line for line in printed.err.splitlines() if line.startswith("NO TABLE IS READ"))
    assert why in line
    assert json.loads(printed.out)["examined"][0]["reads_tables"] is False


def test_a_deterministic_server_is_asked_for_as_one(
    server: Answers, asked: list[LookupRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    server.says(BUILTIN | {"enable_deterministic_inference": True})
    assert main.main(("doctor", "--json", "--url", server.url, *HERE)) == 0
    assert [question.deterministic for question in asked] == [True]
    assert json.loads(capsys.readouterr().out)["examined"][0]["reads_tables"] is False


@pytest.mark.usefixtures("asked")
def test_the_key_of_a_server_is_sent_to_it(server: Answers) -> None:
    server.says(BUILTIN)
    assert main.main(("doctor", "--json", "--url", server.url, "--api-key", "sesame", *HERE)) == 0
    assert server.keys == ["Bearer sesame"]


def test_a_model_of_another_machine_is_asked_for(server: Answers, refusal: Refusal) -> None:
    server.says(BUILTIN | {"model_path": "/models/of/another/machine"})
    line = refusal("--url", server.url, *HERE)
    assert "/models/of/another/machine" in line and "--model" in line


@pytest.mark.usefixtures("asked")
def test_a_model_that_is_named_stands_for_one_of_another_machine(
    server: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    server.says(BUILTIN | {"model_path": "/models/of/another/machine"})
    assert main.main(("doctor", "--json", "--url", server.url, "--model", "Qwen3-30B-A3B", *HERE)) == 0
    assert json.loads(capsys.readouterr().out)["examined"][0]["model"] == "Qwen3-30B-A3B"


def test_a_model_that_is_not_known_here_is_asked_for(server: Answers, refusal: Refusal) -> None:
    server.says(BUILTIN | {"model_path": "finetune-of-tuesday"})
    line = refusal("--url", server.url, *HERE)
    assert "finetune-of-tuesday" in line and line.endswith("or name it with --model")


@pytest.mark.usefixtures("asked")
def test_a_quantization_that_nobody_states_is_asked_for(server: Answers, refusal: Refusal) -> None:
    server.says(BUILTIN | {"quantization": "quark_int4fp8_moe"})
    line = refusal("--url", server.url, *HERE)
    assert "quark_int4fp8_moe" in line and "--dtype" in line


def test_a_dtype_that_is_named_comes_before_the_servers(server: Answers, asked: list[LookupRequest]) -> None:
    server.says(BUILTIN | {"quantization": "quark_int4fp8_moe"})
    assert main.main(("doctor", "--json", "--url", server.url, "--dtype", "fp8_w8a8", *HERE)) == 0
    assert [question.shape.quantization.scheme for question in asked] == ["fp8_w8a8"]


@pytest.mark.parametrize(
    "flag",
    [
        ("--tp-size", "2"),
        ("--ep-size", "2"),
        ("--shape", "E=8,N=64,K=64,topk=2"),
        ("--moe-runner-backend", "cutlass"),
        ("--disable-shared-experts-fusion",),
        ("--enable-deterministic-inference",),
    ],
    ids=lambda flag: flag[0],
)
def test_a_flag_that_the_server_answers_is_refused(server: Answers, refusal: Refusal, flag: tuple[str, ...]) -> None:
    server.says(BUILTIN)
    line = refusal("--url", server.url, *flag, *HERE)
    assert flag[0] in line and "--url" in line


@pytest.mark.parametrize(
    ("status", "body", "culprit"),
    [
        (200, b"<html>hello</html>", "no JSON"),
        (200, b'{"model_path": "Qw', "no JSON"),
        (200, b"\xff\xfe", "no JSON"),
        (200, b"[" * 100_000, "no JSON"),
        (200, b"[]", "list"),
        (200, b'{"vllm_config": "..."}', "tp_size=nothing"),
        (401, b"", "--api-key"),
        (500, b"oh no", "HTTP 500"),
    ],
    ids=["a web page", "truncated", "no text", "too deep", "a list", "another engine", "a key is missing", "broken"],
)
def test_what_is_no_sglang_server_is_one_line(
    server: Answers, refusal: Refusal, status: int, body: bytes, culprit: str
) -> None:
    server.bodies["/server_info"] = (status, body)
    line = refusal("--url", server.url, *HERE)
    assert server.url in line and culprit in line


def test_a_web_server_without_the_path_is_one_line(server: Answers, refusal: Refusal) -> None:
    line = refusal("--url", server.url, *HERE)
    assert server.url in line and "SGLang server" in line


def test_a_host_that_does_not_answer_is_one_line(refusal: Refusal) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        line = refusal("--url", url, *HERE)
    assert url in line and "is the server up" in line


def test_a_server_that_hangs_up_is_one_line(refusal: Refusal) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def hang_up() -> None:
            listening.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        assert url in refusal("--url", url, *HERE)


@pytest.mark.parametrize(
    "url", ["localhost:30000", "file:///etc/passwd", "http://", "http://a:99999", "http://[::1", "http://a b:1", ""]
)
def test_what_is_no_address_is_one_line(url: str, refusal: Refusal) -> None:
    assert f"--url {url}" in refusal("--url", url, *HERE)
