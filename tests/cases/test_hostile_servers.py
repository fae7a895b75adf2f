"""Servers, prompts and captured files that answer as none should: one line, in bounded time and memory."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sglang_moe_ext.core import EngineError, ModelError, MoEExtError, MoEShape, Parallelism
from sglang_moe_ext.engines.sglang import routing_hook, server_info, server_routing
from sglang_moe_ext.engines.sglang.server_client import Server, clean_key, is_loopback
from sglang_moe_ext.engines.sglang.sharding import launched_shape
from sglang_moe_ext.models import resolve
from sglang_moe_ext.tuning.bench import captured_routing
from sglang_moe_ext.tuning.bench.routing import REMOTE

REPO_ROOT = Path(__file__).resolve().parents[2]
CASES = REPO_ROOT / "tests" / "data" / "cases"
KEY = "SECRETKEY"
INFO = {"model_path": "Qwen3-30B-A3B", "version": "0.5.23", "tp_size": 1}
Reply = Callable[[socket.socket, bytes], None]


def answered(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join((*lines, "", "")).encode() + body


INFO_ANSWER = answered(json.dumps(INFO).encode())


class Raw:
    """A server that answers each request by a function of its socket, and keeps what it was sent."""

    def __init__(self, reply: Reply) -> None:
        self.reply, self.requests = reply, list[bytes]()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            request = connection.recv(1 << 16)
            self.requests.append(request)
            try:
                self.reply(connection, request)
            except OSError:
                return


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Reply], Raw]]:
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers: list[Raw] = []

    def start(reply: Reply) -> Raw:
        servers.append(Raw(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.listening.close()


def refusal(server: Server, task: Callable[[Server], Any]) -> str:
    with pytest.raises(EngineError) as refused:
        task(server)
    line = str(refused.value)
    assert line.isprintable()
    assert len(line) < 700
    assert KEY not in line
    return line


def generate(server: Server) -> object:
    return server_routing.generate(server, "hello", 4)


def without_end(connection: socket.socket, _: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while True:
        connection.sendall(b'["x",' * 65_536)


def slow_body(connection: socket.socket, _: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        connection.sendall(b"[")
        time.sleep(0.05)


def slow_headers(connection: socket.socket, _: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X: y\r\n")
        time.sleep(0.05)


def hanging_error(connection: socket.socket, _: bytes) -> None:
    connection.sendall(b"HTTP/1.1 500 Internal\r\nContent-Length: 300\r\n\r\nx")
    time.sleep(60)


def says(content: bytes) -> Reply:
    return lambda connection, _: connection.sendall(content)


class TestOneExchange:
    def test_rel_02_an_answer_without_an_end_is_one_line(self, serve: Any) -> None:
        start = time.monotonic()
        line = refusal(Server(serve(without_end).url, timeout_s=20, most_bytes=16 << 20), generate)
        assert "more than 16 MiB" in line
        assert time.monotonic() - start < 20

    @pytest.mark.parametrize("reply", [slow_body, slow_headers, hanging_error], ids=lambda reply: reply.__name__)
    def test_one_limit_holds_for_the_whole_exchange(self, serve: Any, reply: Reply) -> None:
        start = time.monotonic()
        refusal(Server(serve(reply).url, timeout_s=1), generate)
        assert time.monotonic() - start < 4

    def test_rel_05_an_error_whose_body_hangs_is_the_error(self, serve: Any) -> None:
        server = serve(
            lambda connection, _: connection.sendall(b"HTTP/1.1 500 Internal\r\nContent-Length: 300\r\n\r\nx")
        )
        assert "answers HTTP 500: x" in refusal(Server(server.url, timeout_s=5), generate)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\x00" * 100,
            b"HTTP/1.1 999999 \x1b[31m\r\n\r\n",
            b"HTTP/1.1 500 \x1b[31mred\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7fffffffffffffff\r\nabc",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc",
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nContent-Length: -7\r\n\r\nx",
            b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
            b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
            answered(b"[" * 2_000_000),
            answered(b'{"a":' * 200_000),
            answered(b"\xff\xfe\x00"),
            answered(b"9" * 10_000),
            b"HTTP/1.1 307 Elsewhere\r\nLocation: http://a b/\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 302 Elsewhere\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 302 Here\r\nLocation: /server_info\r\nContent-Length: 0\r\n\r\n",
        ],
        ids=range(17),
    )
    def test_any_answer_is_one_line(self, serve: Any, content: bytes) -> None:
        server = Server(serve(says(content)).url, KEY, timeout_s=5)
        refusal(server, server_info.ask_model_path)
        refusal(server, lambda it: server_info.ask(it.url, it.api_key))

    @pytest.mark.parametrize("timeout_s", [float("inf"), 1e20, -1.0, 0.0, float("nan")])
    def test_an_impossible_limit_is_one_line(self, timeout_s: float) -> None:
        assert "--timeout" in refusal(Server("http://127.0.0.1:1", timeout_s=timeout_s), generate)

    @pytest.mark.parametrize("field", ["model_path", "version", "device", "moe_a2a_backend", "quantization"])
    @pytest.mark.parametrize(
        "text", ["\ud800", "\x1b[31mred", "x" * 1_000_000, "a\u202eb"], ids=["surrogate", "colour", "long", "direction"]
    )
    def test_text_that_no_terminal_should_see_is_refused(self, serve: Any, field: str, text: str) -> None:
        server = serve(says(answered(json.dumps(INFO | {field: text}).encode())))
        assert field in refusal(Server(server.url), lambda it: server_info.ask(it.url))

    def test_numbers_of_any_size_are_one_line(self, serve: Any) -> None:
        huge = serve(says(answered(b'{"model_path": "m", "version": "1", "tp_size": ' + b"9" * 4000 + b"}")))
        refusal(Server(huge.url), lambda it: server_info.ask(it.url))


class TestWhereItGoes:
    def test_a_redirection_to_another_server_is_not_followed(self, serve: Any) -> None:
        other = serve(says(INFO_ANSWER))
        redirect = f"HTTP/1.1 302 Found\r\nLocation: {other.url}/server_info\r\nContent-Length: 0\r\n\r\n".encode()
        line = refusal(Server(serve(says(redirect)).url, KEY), server_info.ask_model_path)
        assert "redirects to another server" in line
        assert not other.requests

    def test_a_redirection_to_another_path_is(self, serve: Any) -> None:
        def reply(connection: socket.socket, request: bytes) -> None:
            if b"GET /there" in request:
                connection.sendall(INFO_ANSWER)
            else:
                connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /there\r\nContent-Length: 0\r\n\r\n")

        assert server_info.ask_model_path(Server(serve(reply).url)) == "Qwen3-30B-A3B"

    def test_this_machine_is_asked_without_a_proxy(self, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        proxy = serve(says(answered(b"{}")))
        monkeypatch.setenv("http_proxy", proxy.url)
        assert server_info.ask_model_path(Server(serve(says(INFO_ANSWER)).url, KEY)) == "Qwen3-30B-A3B"
        assert not proxy.requests

    @pytest.mark.parametrize(
        ("url", "is_here"),
        [
            ("http://127.0.0.1:1", True),
            ("http://127.8.8.8:1", True),
            ("http://localhost:1", True),
            ("http://[::1]:1", True),
            ("http://gpu-7:1", False),
            ("http://127.0.0.1.example.org", False),
            ("http://10.0.0.1", False),
        ],
    )
    def test_an_address_of_this_machine_is_known(self, url: str, is_here: bool) -> None:
        assert is_loopback(url) is is_here


class TestKeys:
    @pytest.mark.parametrize("key", [f"{KEY}\r", f"{KEY}\r\n", f" {KEY} "], ids=repr)
    def test_rel_04_a_key_with_the_end_of_its_line_is_sent_without(self, serve: Any, key: str) -> None:
        server = serve(says(INFO_ANSWER))
        assert server_info.ask_model_path(Server(server.url, key)) == "Qwen3-30B-A3B"
        assert f"Authorization: Bearer {KEY}\r\n".encode() in server.requests[0]

    @pytest.mark.parametrize("key", [f"{KEY}\r\nX: y", f"{KEY}\x00", f"{KEY}é", f"a\n{KEY}"], ids=repr)
    def test_rel_04_a_key_that_no_header_can_have_is_refused_unseen(self, serve: Any, key: str) -> None:
        server = serve(says(INFO_ANSWER))
        assert "--api-key" in refusal(Server(server.url, key), server_info.ask_model_path)
        assert not server.requests

    def test_no_key_is_no_header(self) -> None:
        assert clean_key("\r\n") is None
        assert KEY not in repr(Server("http://here", KEY))


def limited(
    arguments: list[str], *, timeout: float = 60, memory: int = 3_000_000_000
) -> subprocess.CompletedProcess[str]:
    """The command in an address space of that size."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    command = [sys.executable, "-W", "ignore", "-m", "sglang_moe_ext.cli.main", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, preexec_fn=limit, cwd=REPO_ROOT, check=False
    )


class TestPrompts:
    @pytest.mark.parametrize("kind", ["pipe", "device", "folder", "absent", "no text", "no text in its name"])
    def test_a_file_that_is_none_is_one_line(self, tmp_path: Path, kind: str) -> None:
        from sglang_moe_ext.cli import capture

        path = tmp_path / ("a\nb" if kind == "no text in its name" else "prompts")
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "device":
                path = Path("/dev/zero")
            case "folder":
                path.mkdir()
            case "no text":
                path.write_bytes(b"\xff\xff")
        with pytest.raises(MoEExtError) as refused:
            capture.prompts(path)
        assert str(refused.value).isprintable()
        assert "--prompts takes a text file" in str(refused.value)

    def test_rel_02_the_command_ends_in_one_line_within_its_memory(self, serve: Any, tmp_path: Path) -> None:
        def reply(connection: socket.socket, request: bytes) -> None:
            if request.startswith(b"GET"):
                connection.sendall(INFO_ANSWER)
            else:
                without_end(connection, request)

        (tmp_path / "prompts").write_text("hello\n")
        flags = ["capture", "--url", serve(reply).url, "--prompts", str(tmp_path / "prompts"), "--timeout", "30"]
        done = limited([*flags, "--output-dir", str(tmp_path / "ids")])
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: cannot reach")
        assert done.returncode == 1


SHAPE = MoEShape(16, 64, 64, 2)
NAME = "topk_ids_layer0_idx0.pt"


def of_torch_save(thing: object) -> bytes:
    stored = io.BytesIO()
    torch.save(thing, stored)
    return stored.getvalue()


def compressed_bomb() -> bytes:
    """2 GB of zeros in 2 MB."""
    stored = io.BytesIO(of_torch_save(torch.zeros(4, 2, dtype=torch.int32)))
    bomb = io.BytesIO()
    with zipfile.ZipFile(stored) as read, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as write:
        for entry in read.infolist():
            content = read.read(entry)
            write.writestr(entry.filename, bytes(1 << 28) if "/data/" in entry.filename else content)
    return bomb.getvalue()


def many_tensors() -> bytes:
    return of_torch_save([torch.zeros(1, dtype=torch.int32) for _ in range(500)])


class Allocates:
    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (1 << 34,)


def large_buffer() -> bytes:
    return of_torch_save(Allocates())


def legacy_storage() -> bytes:
    stored = io.BytesIO()
    torch.save(torch.zeros(4, 2, dtype=torch.int32), stored, _use_new_zipfile_serialization=False)
    return stored.getvalue().replace(struct.pack("<BB", ord("K"), 8), b"J" + struct.pack("<i", 2**31 - 1), 1)


def nested_lists() -> bytes:
    nested: list[object] = []
    for _ in range(20_000):
        nested = [nested, 0]
    return pickle.dumps([0] * 1_000_000, protocol=2)


class TestCapturedFiles:
    @pytest.mark.parametrize(
        "make", [compressed_bomb, many_tensors, large_buffer, legacy_storage, nested_lists], ids=lambda it: it.__name__
    )
    def test_a_bomb_is_one_line_in_bounded_time_and_memory(self, tmp_path: Path, make: Callable[[], bytes]) -> None:
        (tmp_path / NAME).write_bytes(make())
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        with pytest.raises(MoEExtError) as refused:
            captured_routing.source(tmp_path, SHAPE)
        assert str(refused.value).isprintable()
        assert time.monotonic() - start < 5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB

    def test_a_million_tensors_are_one_line(self, tmp_path: Path) -> None:
        entries = {f"t{number}": {"dtype": "I32", "shape": [0, 2], "data_offsets": [0, 0]} for number in range(100_000)}
        header = json.dumps(entries).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        start = time.monotonic()
        with pytest.raises(MoEExtError, match="more tensors than a capture has layers"):
            captured_routing.source(tmp_path, SHAPE)
        assert time.monotonic() - start < 2

    def test_the_name_of_a_tensor_is_shown_short_and_on_one_line(self, tmp_path: Path) -> None:
        save_file({"x\n\x1b[31m" + "k" * 10_000: torch.tensor([[0, 99]])}, tmp_path / "a.safetensors")
        with pytest.raises(ModelError) as refused:
            captured_routing.source(tmp_path, SHAPE)
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 600

    def test_a_pipe_among_the_files_is_passed_over(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / NAME)
        torch.save(torch.tensor([[0, 1]]), tmp_path / "topk_ids_layer1_idx0.pt")
        assert captured_routing.read(tmp_path, SHAPE)[1][0].tolist() == [[0, 1]]


class TestExpertsThatComputeNothing:
    """Case 18: the router of LongCat-Flash has 256 zero experts behind the 512 real ones."""

    FOLDER = CASES / "18-topk-ids-with-experts-that-compute-nothing"

    @pytest.mark.parametrize("as_seen", ["as-the-kernel-sees", "as-the-router-gives"])
    def test_18_both_views_of_its_routing_are_read(self, as_seen: str) -> None:
        shape = launched_shape(resolve("LongCat-Flash"), Parallelism(8))
        _, (table,) = captured_routing.read(self.FOLDER / as_seen, shape)
        assert table.shape[1] == 12
        assert int(table.max()) < 512
        assert int(table.min()) == REMOTE
        assert len(table) == 32

    def test_18_both_views_are_the_same_work(self) -> None:
        shape = launched_shape(resolve("LongCat-Flash"), Parallelism(8))
        kernel, router = (
            captured_routing.read(self.FOLDER / view, shape)[1][0]
            for view in ("as-the-kernel-sees", "as-the-router-gives")
        )
        for ids in (kernel, router):
            assert all(len(set(row) - {REMOTE}) + row.count(REMOTE) == 12 for row in ids.tolist())

    def test_18_an_id_behind_the_zero_experts_is_refused(self, tmp_path: Path) -> None:
        shape = MoEShape(8, 64, 64, 2, zero_experts=4)
        torch.save(torch.tensor([[0, 12]]), tmp_path / NAME)
        with pytest.raises(ModelError, match=r"\[0, 12\]"):
            captured_routing.source(tmp_path, shape)

    def test_18_the_routing_that_a_server_returns_may_name_them(self) -> None:
        ids = struct.pack("=4i", 3, 515, 0, 767)
        assert server_routing.impossible(ids, 2, 512, 256) is None
        assert server_routing.impossible(ids, 2, 512) is not None

    def test_18_rows_with_some_work_are_captured(self) -> None:
        ids = torch.tensor([[3, REMOTE], [REMOTE, REMOTE], [1, 2]])
        width, rows = routing_hook.RoutingBatch(0, ids, None).rows()
        assert (width, list(struct.unpack("=4i", rows))) == (2, [3, REMOTE, 1, 2])

    def test_18_a_row_with_nothing_but_shared_experts_is_padding(self) -> None:
        ids = torch.tensor([[3, 15], [REMOTE, 15]])
        assert routing_hook.RoutingBatch(0, ids, None, fused_shared=1).rows() == (2, struct.pack("=2i", 3, 15))

    def test_18_one_ranks_mask_is_called_that(self, tmp_path: Path) -> None:
        torch.save(torch.tensor([[3, REMOTE]]), tmp_path / NAME)
        with pytest.raises(ModelError, match="experts of other ranks"):
            captured_routing.source(tmp_path, SHAPE)

    def test_18_places_of_redundant_experts_are_called_that(self, tmp_path: Path) -> None:
        torch.save(torch.tensor([[3, 17]]), tmp_path / NAME)
        with pytest.raises(ModelError, match="redundant experts"):
            captured_routing.source(tmp_path, SHAPE)


def test_routing_that_is_returned_is_still_read(serve: Any) -> None:
    ids = base64.b64encode(struct.pack("=4i", 3, 4, 5, 6)).decode()
    about = {"meta_info": {"prompt_tokens": 2, "completion_tokens": 1, "routed_experts": ids}}
    server = Server(serve(says(answered(json.dumps(about).encode()))).url)
    assert server_routing.split_layers(generate(server), 2) == [struct.pack("=4i", 3, 4, 5, 6)]
