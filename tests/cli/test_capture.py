"""`sglang-moe-ext capture` against a server that answers as SGLang's does, and against ones that do not."""

from __future__ import annotations

import argparse
import base64
import json
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.cli import capture
from sglang_moe_ext.cli import main as command_line
from sglang_moe_ext.core import EngineError, ModelError, MoEExtError, MoEShape
from sglang_moe_ext.engines.sglang import server_routing
from sglang_moe_ext.tuning.bench import captured_routing, routing

TOP_K, EXPERTS, LAYERS = 2, 16, 4
DENSE = 1
"""The first layer is dense."""
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "torch_dtype": "bfloat16",
}
SHAPE = MoEShape(EXPERTS, 64, 64, TOP_K)
SHARED = MoEShape(EXPERTS + 1, 64, 64, TOP_K + 1, fused_shared=1)
Answer = Callable[[str, dict[str, Any]], tuple[int, object]]


@dataclass
class Fake:
    """A server on this machine; `asked` is what it was asked, `routed` what it told of each prompt."""

    model: Path
    url: str = ""
    answer: Answer | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    routed: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, path: str, body: dict[str, Any]) -> tuple[int, object]:
        if path == "/server_info":
            return 200, {"model_path": str(self.model)}
        self.asked.append(body)
        return (self.answer or self.as_sglang)(path, body)

    def as_sglang(self, path: str, body: dict[str, Any]) -> tuple[int, object]:
        prompt, generated = len(body["text"].split()), body["sampling_params"]["max_new_tokens"]
        ids = torch.rand(prompt + generated - 1, LAYERS, EXPERTS).topk(TOP_K, dim=2).indices.int()
        ids[:, :DENSE] = 0
        self.routed.append(ids)
        return 200, answered(ids.numpy().tobytes(), prompt, generated)


def answered(ids: bytes, prompt: int, generated: int) -> dict[str, Any]:
    text = base64.b64encode(ids).decode()
    return {"meta_info": {"prompt_tokens": prompt, "completion_tokens": generated, "routed_experts": text}}


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    made = Fake(model)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            made.headers.append(dict(self.headers.items()))
            status, document = made(self.path, json.loads(body) if body else {})
            content = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    server.shutdown()
    server.server_close()


def run(fake: Fake, tmp_path: Path, *flags: str, text: str = "one two three\nfour five\n") -> Path:
    """The folder that the command writes."""
    (tmp_path / "prompts").write_text(text)
    parser = argparse.ArgumentParser()
    capture.add_to(parser)
    folder = tmp_path / "ids"
    given = ["--url", fake.url, "--prompts", str(tmp_path / "prompts"), "--output-dir", str(folder), *flags]
    capture.run(parser.parse_args(given))
    return folder


def refused(fake: Fake, tmp_path: Path, *flags: str, text: str = "one two three\n") -> str:
    with pytest.raises(MoEExtError) as raised:
        run(fake, tmp_path, *flags, text=text)
    assert "\n" not in str(raised.value)
    return str(raised.value)


class TestWhatIsWritten:
    def test_the_tuner_routes_by_what_the_server_returned(self, fake: Fake, tmp_path: Path) -> None:
        found = captured_routing.source(run(fake, tmp_path, "--max-tokens", "4"), SHAPE)
        [made] = routing.routings(found, SHAPE, 11, 1, 0, "cpu")
        told = torch.cat(fake.routed)
        layers = [told[:, layer].tolist() for layer in range(DENSE, LAYERS)]
        assert made.topk_ids.tolist() in layers

    def test_there_is_one_file_for_each_moe_layer_and_none_for_a_dense_one(self, fake: Fake, tmp_path: Path) -> None:
        names = sorted(path.name.partition("_idx")[0] for path in run(fake, tmp_path).iterdir())
        assert names == ["topk_ids_layer1", "topk_ids_layer2", "topk_ids_layer3"]

    def test_the_tuner_adds_the_shared_experts_that_the_server_drops(self, fake: Fake, tmp_path: Path) -> None:
        found = captured_routing.source(run(fake, tmp_path), SHARED)
        [made] = routing.routings(found, SHARED, 8, 1, 0, "cpu")
        assert made.topk_ids[:, -1].tolist() == [EXPERTS] * 8

    def test_a_second_run_adds_to_the_first(self, fake: Fake, tmp_path: Path) -> None:
        run(fake, tmp_path)
        assert len(list(run(fake, tmp_path).iterdir())) == 6

    def test_the_document_says_what_to_run_next(
        self, fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "prompts").write_text("one two three\nfour five\n")
        folder = tmp_path / "ids"
        asked = ("--url", fake.url, "--prompts", str(tmp_path / "prompts"), "--output-dir", str(folder))
        assert command_line.main(("capture", *asked, "--max-tokens", "4", "--json")) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["next"] == f"sglang-moe-ext tune --model {fake.model} --topk-ids-dir {folder}"
        assert (said["layers"], said["tokens"], sorted(said["files"])) == (3, 11, sorted(map(str, folder.iterdir())))


class TestWhatIsAsked:
    def test_every_prompt_is_asked_with_its_routing(self, fake: Fake, tmp_path: Path) -> None:
        run(fake, tmp_path, "--max-tokens", "7")
        assert [body["text"] for body in fake.asked] == ["one two three", "four five"]
        assert all(body["return_routed_experts"] is True for body in fake.asked)
        assert all(body["sampling_params"]["max_new_tokens"] == 7 for body in fake.asked)

    def test_the_key_goes_with_every_question(self, fake: Fake, tmp_path: Path) -> None:
        run(fake, tmp_path, "--api-key", "secret")
        assert [sent.get("Authorization") for sent in fake.headers] == ["Bearer secret"] * 3

    def test_a_server_of_an_old_release_is_asked_for_its_model_as_it_answers(self, fake: Fake, tmp_path: Path) -> None:
        class Old(Fake):
            def __call__(self, path: str, body: dict[str, Any]) -> tuple[int, object]:
                if path == "/get_server_info":
                    return super().__call__("/server_info", body)
                return (404, {}) if path == "/server_info" else super().__call__(path, body)

        fake.__class__ = Old
        assert list(run(fake, tmp_path).iterdir())

    def test_a_model_that_is_named_is_not_asked_for(self, fake: Fake, tmp_path: Path) -> None:
        served, fake.model = fake.model, Path("/nowhere")
        assert list(run(fake, tmp_path, "--model", str(served)).iterdir())

    @pytest.mark.parametrize(
        ("line", "prompt"),
        [
            ("plain text", "plain text"),
            ('{"text": "a b"}', "a b"),
            ('{"prompt": "c d", "id": 3}', "c d"),
            ('"quoted text"', "quoted text"),
            ('{"neither": 1}', '{"neither": 1}'),
            ("{broken", "{broken"),
            ("42", "42"),
        ],
    )
    def test_a_line_is_a_prompt_or_json_with_one(self, line: str, prompt: str, tmp_path: Path) -> None:
        (tmp_path / "prompts").write_text(f"\n{line}\n\n")
        assert capture.prompts(tmp_path / "prompts") == [prompt]


class TestMistakes:
    def test_a_server_without_the_flag_is_told_of_it(self, fake: Fake, tmp_path: Path) -> None:
        fake.answer = lambda path, body: (200, {"meta_info": {"prompt_tokens": 3, "completion_tokens": 1}})
        said = refused(fake, tmp_path)
        assert "--enable-return-routed-experts" in said
        assert "SGLANG_MOE_EXT_CAPTURE" in said

    def test_an_error_of_the_server_is_repeated(self, fake: Fake, tmp_path: Path) -> None:
        fake.answer = lambda path, body: (500, b"out of\nmemory")
        assert "answers HTTP 500: out of memory" in refused(fake, tmp_path)

    @pytest.mark.parametrize("content", [b"<html>", b"", b"\xff", b"[" * 100_000])
    def test_an_answer_that_is_no_json_is_refused(self, content: bytes, fake: Fake, tmp_path: Path) -> None:
        fake.answer = lambda path, body: (200, content)
        assert "is that an SGLang server's address?" in refused(fake, tmp_path)

    @pytest.mark.parametrize("text", ["###", "a", "é", 7, ["AAAA"]])
    def test_a_text_that_is_no_base64_is_refused(self, text: object, fake: Fake, tmp_path: Path) -> None:
        about = {"prompt_tokens": 3, "completion_tokens": 1, "routed_experts": text}
        fake.answer = lambda path, body: (200, {"meta_info": about})
        assert "no base64 text" in refused(fake, tmp_path)

    @pytest.mark.parametrize("size", [0, 4, 25])
    def test_ids_of_another_size_are_refused(self, size: int, fake: Fake, tmp_path: Path) -> None:
        fake.answer = lambda path, body: (200, answered(b"\1" * size, 3, 1))
        assert f"{size} bytes of routed_experts for 3 tokens" in refused(fake, tmp_path)

    @pytest.mark.parametrize("count", [None, "3", 1.5, True])
    def test_tokens_that_are_not_counted_are_refused(self, count: object, fake: Fake, tmp_path: Path) -> None:
        about = answered(b"", 3, 1)["meta_info"] | {"prompt_tokens": count}
        fake.answer = lambda path, body: (200, {"meta_info": about})
        assert "does not count its tokens" in refused(fake, tmp_path)

    @pytest.mark.parametrize("row", [(3, EXPERTS), (-1, 3), (5, 5)])
    def test_experts_that_the_model_cannot_take_are_refused(
        self, row: tuple[int, int], fake: Fake, tmp_path: Path
    ) -> None:
        fake.answer = lambda path, body: (200, answered(struct.pack("=2i", *row) * 3, 3, 1))
        assert "name the model it serves with --model" in refused(fake, tmp_path)

    def test_another_number_of_layers_for_another_prompt_is_refused(self, fake: Fake, tmp_path: Path) -> None:
        answers = iter([answered(struct.pack("=2i", 1, 2) * layers, 1, 1) for layers in (3, 4)])
        fake.answer = lambda path, body: (200, next(answers))
        assert "4 layers for prompt 2, 3 before" in refused(fake, tmp_path, text="one\ntwo\n")

    def test_nothing_is_written_when_the_last_prompt_fails(self, fake: Fake, tmp_path: Path) -> None:
        answers = iter([(200, answered(struct.pack("=2i", 1, 2), 1, 1)), (500, b"")])
        fake.answer = lambda path, body: next(answers)
        refused(fake, tmp_path, text="one\ntwo\n")
        assert not (tmp_path / "ids").exists()

    def test_a_server_that_routes_nothing_is_refused(self, fake: Fake, tmp_path: Path) -> None:
        fake.answer = lambda path, body: (200, answered(bytes(3 * LAYERS * TOP_K * 4), 3, 1))
        assert "no layer with experts" in refused(fake, tmp_path)

    def test_a_model_that_is_not_here_is_asked_for(self, fake: Fake, tmp_path: Path) -> None:
        fake.model = Path("/nowhere/at/all")
        said = refused(fake, tmp_path)
        assert "/nowhere/at/all" in said
        assert "--model" in said

    def test_a_server_that_does_not_say_its_model_is_asked_no_further(self, fake: Fake, tmp_path: Path) -> None:
        class Silent(Fake):
            def __call__(self, path: str, body: dict[str, Any]) -> tuple[int, object]:
                return 200, {}

        fake.__class__ = Silent
        assert "name it with --model" in refused(fake, tmp_path)

    @pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[", "http://nowhere.invalid", "http://a b"])
    def test_a_server_that_cannot_be_reached_is_named(self, url: str, fake: Fake, tmp_path: Path) -> None:
        fake.url = url
        said = refused(fake, tmp_path)
        assert url in said
        assert "cannot reach" in said or "expected the address of a server" in said

    @pytest.mark.parametrize("url", ["127.0.0.1:30000", "file:///etc/passwd", "http://", ""])
    def test_an_address_of_another_kind_is_refused(self, url: str, fake: Fake, tmp_path: Path) -> None:
        fake.url = url
        assert "expected the address of a server, such as http://" in refused(fake, tmp_path)

    def test_a_file_without_prompts_is_refused(self, fake: Fake, tmp_path: Path) -> None:
        assert "has no prompt" in refused(fake, tmp_path, text="\n \n")

    def test_a_file_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(MoEExtError, match=r"cannot read .*nowhere.*: .*--prompts takes a text file"):
            capture.prompts(tmp_path / "nowhere")

    @pytest.mark.parametrize("flags", [("--max-tokens", "0"), ("--timeout", "0"), ("--timeout", "nan")])
    def test_impossible_numbers_are_refused(self, flags: tuple[str, str], fake: Fake, tmp_path: Path) -> None:
        assert "expected positive numbers" in refused(fake, tmp_path, *flags)

    def test_a_folder_that_cannot_be_written_is_named(self, fake: Fake, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert "--output-dir" in refused(fake, tmp_path, "--output-dir", str(tmp_path / "file" / "ids"))


SIZES = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))


@given(SIZES, st.data())
def test_each_layer_comes_out_as_it_went_in(sizes: tuple[int, int, int], data: st.DataObject) -> None:
    rows, layers, top_k = sizes
    numbers = st.lists(st.integers(0, 500), min_size=rows * layers * top_k, max_size=rows * layers * top_k)
    ids = torch.tensor(data.draw(numbers), dtype=torch.int32).view(rows, layers, top_k)
    found = server_routing.split_layers(answered(ids.numpy().tobytes(), rows, 1), top_k)
    assert found == [ids[:, layer].contiguous().numpy().tobytes() for layer in range(layers)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(), inner)
        | st.fixed_dictionaries(
            {},
            optional={
                "meta_info": inner,
                "routed_experts": inner,
                "prompt_tokens": inner,
                "completion_tokens": inner,
            },
        )
    ),
)


@given(JSON)
def test_no_answer_is_anything_but_routing_or_an_error_of_ours(answer: object) -> None:
    try:
        server_routing.split_layers(answer, TOP_K)
    except EngineError as error:
        assert str(error)


def test_the_error_of_a_model_is_a_models_error(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        run(fake, tmp_path, "--model", "no such model")
