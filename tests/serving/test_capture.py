"""The capture beside a server: what the user asks for, what lies on the disk, what a broken disk or process leaves."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file

from sglang_moe_ext import env
from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.engines.sglang.routing_hook import RoutingBatch
from sglang_moe_ext.serving import capture
from sglang_moe_ext.serving.capture import CaptureRequest, FolderBounds, Recorder, RoutingTable
from sglang_moe_ext.tuning.bench import captured_routing, routing

CHILD = Path(__file__).parent / "children" / "capturing.py"
SHAPE = MoEShape(16, 64, 64, 2)
SHARED = MoEShape(17, 64, 64, 3, fused_shared=1)
PATIENCE_S = 30.0


def wait_until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def ids_of(tokens: int, width: int = 2, experts: int = 16) -> torch.Tensor:
    return torch.rand(tokens, experts).topk(width, dim=1).indices.int()


def table(tokens: int, layer: int = 0) -> RoutingTable:
    return RoutingTable(layer, 2, ids_of(tokens).numpy().tobytes())


def rows_kept(folder: Path) -> list[int]:
    return sorted(len(load_file(file)["topk_ids"]) for file in folder.glob("*.safetensors"))


def a_module() -> ModuleType:
    """A module with an engine's runner, whose layer returns its ids."""

    class MoeRunner:
        def __init__(self, layer_id: int = 0) -> None:
            self.config = SimpleNamespace(num_experts=16, num_local_experts=16, layer_id=layer_id)

        def run(self, dispatch_output: Any, quant_info: object, lora_info: object = None) -> Any:
            return dispatch_output.topk_output.topk_ids

    module = ModuleType("runner")
    vars(module)["MoeRunner"] = MoeRunner
    return module


def run(module: Any, ids: torch.Tensor, layer: int = 0) -> Any:
    return module.MoeRunner(layer).run(SimpleNamespace(topk_output=SimpleNamespace(topk_ids=ids)), None)


class TestTheWish:
    @pytest.mark.parametrize(
        ("value", "meant"),
        [
            ("/data/ids", CaptureRequest(Path("/data/ids"))),
            ("/data/ids:50", CaptureRequest(Path("/data/ids"), 50)),
            ("/data/ids:50:64", CaptureRequest(Path("/data/ids"), 50, 64)),
            ("/data/ids/", CaptureRequest(Path("/data/ids"))),
            ("/run:7/ids:50", CaptureRequest(Path("/run:7/ids"), 50)),
            ("/data/ids:50/", CaptureRequest(Path("/data/ids:50"))),
        ],
    )
    def test_it_has_a_folder_and_up_to_two_numbers(self, value: str, meant: CaptureRequest) -> None:
        assert capture.parse_request({env.CAPTURE: value}) == meant

    def test_a_relative_folder_is_meant_where_the_server_started(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert capture.parse_request({env.CAPTURE: "ids"}) == CaptureRequest(tmp_path / "ids")

    @pytest.mark.parametrize("environ", [{}, {env.CAPTURE: ""}], ids=["unset", "empty"])
    def test_nothing_is_captured_and_nothing_said_unless_it_is_set(
        self, environ: dict[str, str], caplog: pytest.LogCaptureFixture
    ) -> None:
        assert capture.parse_request(environ) is None
        assert not caplog.records

    @pytest.mark.parametrize(
        "value",
        [":", ":5", "ids:", "ids:0", "ids:-1", "ids:many", "ids:1:2:3", "ids:5:", "ids:1e3", "ids:²", "/a/:5:x"],
    )
    def test_a_malformed_one_is_one_line_and_no_capture(self, value: str, caplog: pytest.LogCaptureFixture) -> None:
        assert capture.parse_request({env.CAPTURE: value}) is None
        [record] = caplog.records
        assert value in record.getMessage()
        assert "expected DIR[:max_files][:min_tokens]" in record.getMessage()

    @given(st.text(max_size=40))
    def test_no_text_raises(self, value: str) -> None:
        capture.parse_request({env.CAPTURE: value})


class TestTheInstallation:
    def test_a_runner_that_moved_is_one_line_and_no_capture(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert not capture.install(ModuleType("runner"), CaptureRequest(tmp_path))
        [record] = caplog.records
        assert "runner has no MoeRunner.run" in record.getMessage()

    def test_the_log_says_where_and_how_much(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        capture.install(a_module(), CaptureRequest(tmp_path, 50, 64))
        [record] = caplog.records
        assert f"batches of 64 tokens or more, at most 50 files, into {tmp_path};" in record.getMessage()

    def test_nothing_is_written_before_a_batch_comes(self, tmp_path: Path) -> None:
        capture.install(a_module(), CaptureRequest(tmp_path / "ids"))
        assert not (tmp_path / "ids").exists()


class TestWhatLiesThere:
    def test_the_tuner_routes_by_what_a_server_wrote(self, tmp_path: Path) -> None:
        module, ids = a_module(), ids_of(20)
        capture.install(module, CaptureRequest(tmp_path))
        run(module, ids)
        wait_until(lambda: rows_kept(tmp_path))
        [made] = routing.routings(captured_routing.source(tmp_path, SHAPE), SHAPE, 20, 1, 0, "cpu")
        assert torch.equal(made.topk_ids.cpu(), ids)

    def test_fused_shared_experts_are_the_tuners_too(self, tmp_path: Path) -> None:
        module = a_module()
        ids = torch.cat((ids_of(20), torch.full((20, 1), 16, dtype=torch.int32)), dim=1)
        capture.install(module, CaptureRequest(tmp_path))
        run(module, ids)
        wait_until(lambda: rows_kept(tmp_path))
        [made] = routing.routings(captured_routing.source(tmp_path, SHARED), SHARED, 20, 1, 0, "cpu")
        assert torch.equal(made.topk_ids.cpu(), ids)

    def test_a_batch_is_written_as_it_was_when_the_layer_began(self, tmp_path: Path) -> None:
        module, ids = a_module(), ids_of(20)
        before = ids.clone()
        capture.install(module, CaptureRequest(tmp_path))
        run(module, ids).zero_()
        wait_until(lambda: rows_kept(tmp_path))
        [file] = tmp_path.glob("*.safetensors")
        assert torch.equal(load_file(file)["topk_ids"], before)

    def test_a_batch_of_fewer_tokens_is_left_out(self, tmp_path: Path) -> None:
        module = a_module()
        capture.install(module, CaptureRequest(tmp_path, min_tokens=8))
        for tokens in (7, 8):
            run(module, ids_of(tokens))
        wait_until(lambda: rows_kept(tmp_path))
        assert rows_kept(tmp_path) == [8]

    @given(
        st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3), max_size=20), st.integers(0, 99)
    )
    def test_safetensors_reads_the_table_that_was_encoded(self, rows: list[list[int]], layer: int) -> None:
        ids = torch.tensor(rows, dtype=torch.int32).view(-1, 3)
        read = load(capture.encode(RoutingTable(layer, 3, ids.numpy().tobytes())))["topk_ids"]
        assert torch.equal(read, ids)


class TestTheBound:
    @given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 8))
    def test_the_largest_batches_are_kept(self, sizes: list[int], most: int) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for index, size in enumerate(sizes):
                capture.keep(folder, table(size), index, "0123abcd", FolderBounds(most))
            assert rows_kept(folder) == sorted(sizes)[-most:]

    def test_all_files_together_are_no_larger_than_that(self, tmp_path: Path) -> None:
        bounds = FolderBounds(1000, most_bytes=4000)
        for index in range(20):
            capture.keep(tmp_path, table(50 + index), index, "0123abcd", bounds)
            assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 4000
        assert rows_kept(tmp_path)[-1] == 69

    def test_a_table_that_is_larger_than_all_room_is_left_out(self, tmp_path: Path) -> None:
        assert capture.keep(tmp_path, table(5000), 0, "0123abcd", FolderBounds(10, most_bytes=4000)) == 4000
        assert rows_kept(tmp_path) == []

    def test_two_runs_share_the_bound_and_take_no_name_from_each_other(self, tmp_path: Path) -> None:
        for run_name in ("00000000", "11111111", "22222222"):
            for index in range(2):
                capture.keep(tmp_path, table(10), index, run_name, FolderBounds(5))
        assert rows_kept(tmp_path) == [10] * 5

    def test_files_of_others_are_neither_counted_nor_removed(self, tmp_path: Path) -> None:
        others = [tmp_path / name for name in ("topk_ids_layer0_idx0.pt", "model.safetensors")]
        for other in others:
            other.touch()
        for index in range(3):
            capture.keep(tmp_path, table(10 + index), index, "0123abcd", FolderBounds(1))
        assert all(other.exists() for other in others)
        assert len(list(tmp_path.iterdir())) == 3

    def test_a_batch_that_would_not_be_kept_is_not_even_copied(self, tmp_path: Path) -> None:
        recorder = Recorder(CaptureRequest(tmp_path, max_files=1))
        recorder.take(RoutingBatch(0, ids_of(50), None))
        wait_until(lambda: not recorder.wants(50, 400))
        assert recorder.wants(500, 4000)

    def test_batches_that_come_faster_than_the_disk_takes_them_are_counted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(capture, "_MOST_WAITING_BYTES", 100)
        recorder = Recorder(CaptureRequest(tmp_path))
        for _ in range(3):
            recorder.take(RoutingBatch(0, ids_of(50), None))
        assert recorder.dropped == 3
        assert len(caplog.records) == 1

    def test_room_in_memory_comes_back_when_a_batch_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(capture, "_MOST_WAITING_BYTES", 500)
        recorder = Recorder(CaptureRequest(tmp_path))
        for written in range(1, 4):
            recorder.take(RoutingBatch(0, ids_of(50), None))
            wait_until(lambda written=written: len(rows_kept(tmp_path)) == written and not recorder._waiting_bytes)
        assert recorder.dropped == 0


class TestFaults:
    @pytest.fixture
    def module(self) -> ModuleType:
        return a_module()

    def broken(self, module: ModuleType, folder: Path, caplog: pytest.LogCaptureFixture) -> str:
        """The one line that it says when that folder cannot be written; the layer runs on."""
        capture.install(module, CaptureRequest(folder))
        for _ in range(3):
            ids = ids_of(20)
            assert run(module, ids) is ids
        wait_until(lambda: caplog.records)
        assert run(module, ids) is ids
        [record] = caplog.records
        return record.getMessage()

    def test_a_folder_that_cannot_be_made_ends_the_capture_in_one_line(
        self, module: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").touch()
        assert str(tmp_path / "file" / "ids") in self.broken(module, tmp_path / "file" / "ids", caplog)

    @pytest.mark.parametrize(
        ("place", "code"),
        [("os.replace", errno.ENOSPC), ("os.fdopen", errno.ENOSPC), ("tempfile.mkstemp", errno.EROFS)],
    )
    def test_a_full_or_read_only_disk_ends_the_capture_in_one_line_and_leaves_no_half_file(
        self,
        place: str,
        code: int,
        module: ModuleType,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(place, refuse)
        assert os.strerror(code) in self.broken(module, tmp_path, caplog)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "dispatched",
        [None, SimpleNamespace(), SimpleNamespace(topk_output=None), SimpleNamespace(topk_output=SimpleNamespace())],
    )
    def test_a_format_without_ids_is_passed_over_in_silence(
        self, dispatched: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        module: Any = a_module()
        module.MoeRunner.run = lambda self, dispatch_output, quant_info: "ran"
        # The name of a lambda's first parameters is all that is looked at.
        assert capture.install(module, CaptureRequest(tmp_path))
        assert module.MoeRunner().run(dispatched, None) == "ran"
        assert not caplog.records

    @pytest.mark.parametrize("ids", ["text", torch.zeros(2, 3, 4), object()], ids=["text", "three sides", "object"])
    def test_ids_of_another_kind_never_reach_the_engine_as_an_error(self, ids: Any, tmp_path: Path) -> None:
        module = a_module()
        capture.install(module, CaptureRequest(tmp_path))
        assert run(module, ids) is ids

    def test_an_error_of_the_layer_is_the_engines_own(self, tmp_path: Path) -> None:
        module: Any = a_module()

        def run_of_engine(self: Any, dispatch_output: Any, quant_info: Any) -> None:
            raise ZeroDivisionError

        module.MoeRunner.run = run_of_engine
        capture.install(module, CaptureRequest(tmp_path))
        with pytest.raises(ZeroDivisionError):
            run(module, ids_of(4))

    def test_a_server_that_is_killed_while_it_captures_leaves_what_the_tuner_reads(self, tmp_path: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        for _ in range(3):
            before = len(rows_kept(tmp_path))
            with subprocess.Popen([sys.executable, str(CHILD), str(tmp_path)], env=environment) as child:
                wait_until(lambda before=before: len(list(tmp_path.glob("topk_ids_layer*"))) > before)
                time.sleep(0.1)  # it is in the middle of the next file
                child.send_signal(signal.SIGKILL)
        whole = len(capture.encode(table(2_000)))
        sizes = [file.stat().st_size for file in tmp_path.iterdir()]
        assert any(0 < size < whole for size in sizes), "no kill met a half-written file"
        [made] = captured_routing.source(tmp_path, SHAPE).makers
        assert isinstance(made, captured_routing.CapturedRouting)
        assert sum(made.lengths) == sum(rows_kept(tmp_path))

    def test_half_written_files_of_a_killed_server_are_removed_when_they_are_old(self, tmp_path: Path) -> None:
        old, new = tmp_path / ".topk_ids_old.tmp", tmp_path / ".topk_ids_new.tmp"
        for path in (old, new):
            path.touch()
        os.utime(old, (0, 0))
        capture.clear_abandoned(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [new.name]


def test_the_module_brings_no_torch_of_its_own() -> None:
    code = "import sys; from sglang_moe_ext.serving import capture; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
