"""The client of the end-to-end measurement ends in its time, whatever a server does."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.e2e.client import Client
from sglang_moe_ext.engines.generation import APIS
from tests.cases.test_hostile_servers import Raw, Reply, answered, hanging_error, says, slow_body, slow_headers

TIMEOUT_S = 1.0


def whole(reply: Reply) -> Reply:
    """The same once the body of the request has come: a socket that is closed before drops its answer."""

    def answer(connection: socket.socket, request: bytes) -> None:
        head, _, body = request.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        while len(body) < length:
            body += connection.recv(1 << 16)
        reply(connection, body)

    return answer


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], Client]]:
    servers: list[Raw] = []

    def start(reply: Reply) -> Client:
        servers.append(Raw(whole(reply)))
        return Client(servers[-1].url, timeout_s=TIMEOUT_S)

    yield start
    for server in servers:
        server.listening.close()


def endless_comments(connection: socket.socket, _: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b": still there\n")
        time.sleep(0.05)


def endless_line(connection: socket.socket, _: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\ndata: ")
    while True:
        connection.sendall(b"x" * (1 << 16))


@pytest.mark.parametrize(
    "reply",
    [slow_body, slow_headers, hanging_error, endless_comments, endless_line, says(b"nonsense"), says(b"")],
    ids=["slow body", "slow headers", "hanging error", "endless comments", "endless line", "nonsense", "nothing"],
)
def test_a_hostile_server_costs_one_request_its_time_and_one_line(
    serve: Callable[[Reply], Client], reply: Reply
) -> None:
    begun = time.monotonic()
    with pytest.raises(EngineError) as refused:
        serve(reply).first_token_ms(10, seed=0)
    assert time.monotonic() - begun < 3 * TIMEOUT_S
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "body", [b"[]", b"{}", b'{"meta_info": {"completion_tokens": "4"}}', b"\xff", b"[" * 100_000], ids=range(5)
)
def test_an_answer_without_a_number_of_tokens_is_refused(serve: Callable[[Reply], Client], body: bytes) -> None:
    with pytest.raises(EngineError, match="expected generated tokens, with their number"):
        serve(says(answered(body))).batch(1, 8, 4, seed=0)


def test_a_stream_of_vllm_is_understood(serve: Callable[[Reply], Client]) -> None:
    event = json.dumps({"choices": [{"text": "a"}]}).encode()
    asked: list[bytes] = []

    def reply(connection: socket.socket, body: bytes) -> None:
        asked.append(body)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\ndata: " + event + b"\n\ndata: [DONE]\n\n")

    client = replace(serve(reply), api=APIS["vllm"], model="a-model")
    assert client.first_token_ms(10, seed=0) > 0
    assert json.loads(asked[0])["model"] == "a-model"
