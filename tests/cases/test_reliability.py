"""Faults of the reliability report that concern tables and hooks: each is an input with its right answer.

The engine is a stand-in; tests/engines holds the same hooks against the real ones.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sglang_moe_ext import env
from sglang_moe_ext.core import MoEShape, Quantization, StoreError, TileConfig
from sglang_moe_ext.engines import config_dict
from sglang_moe_ext.engines.sglang import source_patch, table_names
from sglang_moe_ext.engines.sglang.hook_points import LAYER_MODULES
from sglang_moe_ext.engines.vllm import hook_points as vllm_hook_points
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.serving import attach, guard, kernel_selection, launch_guard, table_search, table_selection
from sglang_moe_ext.serving.guard import ConfigGuard
from sglang_moe_ext.serving.launch_guard import GuardedLauncher
from sglang_moe_ext.serving.table_search import TableDir
from sglang_moe_ext.serving.table_selection import EngineEntry, OurEntry
from sglang_moe_ext.serving.vllm_hooks import fit_launch
from sglang_moe_ext.tables import config_table, files, locks, merge, provenance, user_store
from sglang_moe_ext.tables.merge import StoredTable
from tests.engines.children.dot import multiply
from tests.serving import test_sglang_lookup_hook as stand_in
from tests.serving.test_table_selection import at, write

CASES = Path(__file__).parents[1] / "data" / "cases"
REPO_ROOT = Path(__file__).parents[2]
H200, H100 = find_gpu("H200"), find_gpu("H100")
FP8_BLOCK = MoEShape(4, 256, 512, 2, Quantization("fp8_w8a8", (128, 128)))
W1, W2 = (4, 512, 512), (4, 512, 256)
YOURS, ENGINES = TableDir("your", Path()), TableDir("the engine's", Path(), is_engines=True)


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    guard.warn_once.cache_clear()


# rel-01


def served(tmp_path: Path, shape: MoEShape, entries: dict[str, Any], *, down: bool = False) -> Any:
    """What a hooked lookup gives a layer whose table in the store has those entries: the up and the down entry."""
    for is_down in (False, True) if down else (False,):
        name = table_names.file_name(table_names.table_key(shape, H200.device_name, down=is_down))
        path = tmp_path / "triton_3_7_1" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(entries), encoding="utf-8")
    engine, quantization = stand_in.Engine([at(YOURS, tmp_path)]), shape.quantization
    block = None if quantization.block_shape is None else list(quantization.block_shape)
    experts, columns, hidden = shape.experts, shape.intermediate_size, shape.hidden_size
    weights = (experts, 2 * columns, hidden), (experts, hidden, columns)
    up, (of_down, _) = engine.lookup(
        *weights, shape.top_k, quantization.scheme, 64, block_shape=block, return_down_config=True
    )
    return up, of_down


def entry(**changes: Any) -> dict[str, Any]:
    return config_dict.config_dict_of(TileConfig(16, 64, 64, 1, 4, 3)) | changes


def test_rel_01_no_answer_is_longer_along_k_than_a_block_of_scales(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = next((CASES / "rel-01-tile-wider-than-a-block-of-scales").rglob("E=*.json"))
    up, down = served(tmp_path, FP8_BLOCK, json.loads(table.read_text(encoding="utf-8")), down=True)
    assert (up["BLOCK_SIZE_K"], down["BLOCK_SIZE_K"]) == (128, 128)
    assert "BLOCK_SIZE_K 256 -> 128 of the down projection" in caplog.text


@pytest.mark.parametrize("scheme", ["fp8_w8a8", "int8_w8a8"])
@pytest.mark.parametrize("block", [(128, 128), (64, 64), (128, 64), (64, 128), (32, 32), (96, 96)])
@pytest.mark.parametrize("block_k", [32, 64, 128, 256, 512])
def test_rel_01_for_every_block_of_scales(scheme: Any, block: tuple[int, int], block_k: int, tmp_path: Path) -> None:
    shape = MoEShape(4, 384, 768, 2, Quantization(scheme, block))
    up, _ = served(tmp_path, shape, {"64": entry(BLOCK_SIZE_K=block_k)})
    assert up == stand_in.DEFAULT or block[1] % up["BLOCK_SIZE_K"] == 0


@pytest.mark.parametrize("block", [(128, 128), (64, 128), (96, 96), (128, 96)])
@pytest.mark.parametrize("block_k", [64, 128, 256, 512])
def test_rel_01_in_vllm_a_launch_is_within_a_block_of_scales(block: tuple[int, int], block_k: int) -> None:
    shape = MoEShape(4, 384, 768, 2, Quantization("fp8_w8a8", block))
    runs = fit_launch(ConfigGuard((0, 33, 0), H200, "vllm"), entry(BLOCK_SIZE_K=block_k), shape)
    assert block[1] % min(runs.entry["BLOCK_SIZE_K"], *block) == 0


# F2


UNFIT = {
    "a product too short": {"BLOCK_SIZE_K": 8},
    "a product of one": {"BLOCK_SIZE_K": 1},
    "a tile that compiles for minutes": {
        "BLOCK_SIZE_M": 1024,
        "BLOCK_SIZE_N": 1024,
        "BLOCK_SIZE_K": 16,
        "num_stages": 1,
    },
    "rows that are no power of two": {"BLOCK_SIZE_M": 48},
    "columns that are no power of two": {"BLOCK_SIZE_N": 80},
    "warps that are no power of two": {"num_warps": 6},
    "no warps": {"num_warps": 0},
    "a group of none": {"GROUP_SIZE_M": 0},
    "a text": {"BLOCK_SIZE_N": "64"},
    "a half": {"BLOCK_SIZE_N": 64.5},
    "infinity": {"num_stages": float("inf")},
    "a truth": {"BLOCK_SIZE_M": True},
    "a number of a thousand digits": {"BLOCK_SIZE_M": 10**1000},
}


@pytest.mark.parametrize("changes", UNFIT.values(), ids=UNFIT)
def test_an_entry_that_cannot_be_launched_leaves_the_engines_default(changes: dict[str, Any], tmp_path: Path) -> None:
    up, _ = served(tmp_path, MoEShape(4, 256, 512, 2), {"64": entry(**changes)})
    assert up in (stand_in.DEFAULT, stand_in.THEIRS)


def test_an_entry_of_8_bits_is_held_against_32(tmp_path: Path) -> None:
    up, _ = served(tmp_path, FP8_BLOCK, {"64": entry(BLOCK_SIZE_K=16)})
    assert up == stand_in.DEFAULT


ROWS = torch.empty(64, 256, dtype=torch.bfloat16, device="meta")
WEIGHTS = torch.empty(8, 512, 256, dtype=torch.bfloat16, device="meta")


def compiling_launcher(refuses: Callable[[dict[str, Any]], bool], ran: list[dict[str, Any]]) -> Callable[..., Any]:
    """As the engine's, with a kernel that Triton's compiler itself refuses."""

    def invoke(A: Any, B: Any, config: dict[str, Any], top_k: int = 1, block_shape: Any = None) -> str:
        ran.append(dict(config))
        if refuses(config):
            signature = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "side": "constexpr", "block_k": "constexpr"}
            source = ASTSource(multiply, signature, constexprs={"side": 32, "block_k": 8})
            triton.compile(source, target=GPUTarget("cuda", 90, 32))
        return "launched"

    return invoke


def test_what_triton_cannot_compile_runs_plainer_from_then_on_and_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ran: list[dict[str, Any]] = []
    launcher = compiling_launcher(lambda config: config["BLOCK_SIZE_N"] > 64, ran)
    hooked = launch_guard.launch_hook(GuardedLauncher(launcher, 2, lambda: None))
    for _ in range(3):
        assert hooked(ROWS, WEIGHTS, entry(BLOCK_SIZE_N=256)) == "launched"
    assert len(ran) == 1 + 1 + 2
    assert (ran[-1]["BLOCK_SIZE_M"], ran[-1]["BLOCK_SIZE_N"]) == (16, 64)
    (line,) = caplog.messages
    assert "cannot be compiled" in line and "\n" not in line


def test_an_option_that_triton_does_not_know_is_dropped_before_the_tile_is_changed() -> None:
    ran: list[dict[str, Any]] = []
    launcher = compiling_launcher(lambda config: "backend" in config, ran)
    hooked = launch_guard.launch_hook(GuardedLauncher(launcher, 2, lambda: None))
    hooked(ROWS, WEIGHTS, entry(backend="flydsl"))
    assert ran[-1] == entry()


def test_what_cannot_be_compiled_in_any_form_raises_the_first_error() -> None:
    hooked = launch_guard.launch_hook(GuardedLauncher(compiling_launcher(lambda _: True, []), 2, lambda: None))
    with pytest.raises(Exception, match="K >= 16"):
        hooked(ROWS, WEIGHTS, entry())


# rel-03


QWEN = MoEShape(128, 768, 2048, 8)


def choice(yours: Path, engines: Path) -> table_selection.Choice:
    found = table_search.search(QWEN, H100.device_name, H100, "3.7.1", [at(YOURS, yours), at(ENGINES, engines)])
    return table_selection.select(found, 64)


def damaged(tmp_path: Path) -> tuple[Path, Path]:
    """The case's store with the cut provenance, beside the engine's own table; the store's table and folder."""
    store = tmp_path / "yours"
    shutil.copytree(CASES / "rel-03-provenance-that-is-damaged" / "store/tables/sglang", store)
    (store / "triton_X_Y_Z").rename(store / "triton_3_7_1")
    name = table_names.file_name(table_names.table_key(QWEN, H100.device_name))
    write(
        tmp_path / "engines",
        {64: TileConfig(16, 64, 64, 9, 4, 3)},
        None,
        shape=QWEN,
        device_name=H100.device_name,
        triton="3.5.1",
    )
    return store, store / "triton_3_7_1" / name


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def replace_by(text: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(text) and None


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGE = {
    "as the case has it": lambda path: None,
    "cut": cut,
    "empty": replace_by(b""),
    "a later format": replace_by(b'{"format": 99}'),
    "too large": replace_by(b" " * (5 << 20)),
    "a folder": make_folder,
    "a pipe": make_pipe,
    "a link to nowhere": make_dangling,
    "a list": replace_by(b"[]"),
    "no UTF-8": replace_by(b"\xff\xfe"),
    "an entry missing": replace_by(b'{"format": 1, "runs": [], "entries": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_rel_03_a_table_with_damaged_provenance_never_stands_before_the_engines(
    damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, table = damaged(tmp_path)
    damage(provenance.sidecar(table))
    assert isinstance(choice(store, tmp_path / "engines"), EngineEntry)


def test_rel_03_one_line_names_the_file_that_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, table = damaged(tmp_path)
    choice(store, tmp_path / "engines")
    (line,) = caplog.messages
    assert str(provenance.sidecar(table)) in line


def test_a_table_without_any_provenance_is_somebodys_own_and_stands_first(tmp_path: Path) -> None:
    store, table = damaged(tmp_path)
    provenance.sidecar(table).unlink()
    assert isinstance(choice(store, tmp_path / "engines"), OurEntry)


# rel-06


def said_by_a_table(tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture) -> list[str]:
    name = table_names.file_name(table_names.table_key(QWEN, H100.device_name))
    folder = tmp_path / "triton_3_7_1"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(text)
    with caplog.at_level(logging.INFO):
        table_search.search(QWEN, H100.device_name, H100, "3.7.1", [at(YOURS, tmp_path)])
    return caplog.messages


NASTY = "\\nINFO all is well\\u001b[32m"
TEXTS = {
    "a long key": '{"' + "k" * (3 << 20) + '": 1}',
    "a key with a line end": '{"64' + NASTY + '": 1}',
    "a long value": json.dumps({"64": entry(BLOCK_SIZE_M="x" * (3 << 20))}),
    "a value with a line end": '{"64": {"BLOCK_SIZE_M": "' + NASTY + '"}}',
    "an option with a line end": json.dumps({"64": entry()})[:-2] + ', "a' + NASTY + '": 1}}',
    "many odd keys": json.dumps({f"odd {at}": 1 for at in range(10_000)} | {"64": entry()}),
    "many odd rows": json.dumps({str(at): 1 for at in range(1, 10_000)}),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_rel_06_what_a_table_says_stands_in_a_log_short_and_printable(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = said_by_a_table(tmp_path, text.encode(), caplog)
    assert lines
    assert all(line.isprintable() and len(line) < 2000 for line in lines)


def test_rel_06_a_field_of_the_kernel_plans_writes_no_line_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = next((CASES / "rel-06-line-of-a-log-by-a-file").rglob("*.paths.json"))
    folder = tmp_path / "triton_3_7_1"
    folder.mkdir()
    shutil.copy(file, folder)
    kernel_selection.load_plans(MoEShape(12, 320, 512, 3), "NVIDIA H200", "3.7.1", [at(YOURS, tmp_path)])
    (line,) = caplog.messages
    assert line.isprintable() and len(line) < 1000


# rel-07


KILLED = """
import os, sys
from pathlib import Path
from sglang_moe_ext.core import TileConfig
from sglang_moe_ext.tables import files, merge
from sglang_moe_ext.tables.merge import StoredTable
at, replace = int(sys.argv[2]), os.replace
def replace_or_die(source, target):
    global at
    at -= 1
    if at < 0:
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace = replace_or_die
folder = Path(sys.argv[1])
up, down = folder / "E=8.json", folder / "E=8_down.json"
config = TileConfig(64, 64, 64, 1, 4, 3)
merge.put({up: StoredTable({64: config}, None), down: StoredTable({64: config}, None)}, [(up, down)])
"""


def write_pair(folder: Path, block_m: int, dies_at: int | None = None) -> None:
    up, down = folder / "E=8.json", folder / "E=8_down.json"
    config = TileConfig(block_m, 64, 64, 1, 4, 3)
    merge.put({up: StoredTable({64: config}, None), down: StoredTable({64: config}, None)}, [(up, down)])


@pytest.mark.parametrize("at", range(4))
def test_rel_07_a_kill_at_any_replace_leaves_no_mixed_pair_and_the_next_run_no_leftovers(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.STORE, str(tmp_path / "store"))
    folder = tmp_path / "triton_3_7_1"
    folder.mkdir()
    write_pair(folder, 16)
    done = subprocess.run([sys.executable, "-c", KILLED, folder, str(at)], cwd=REPO_ROOT, check=False)
    assert done.returncode in (0, -signal.SIGKILL)
    up, down = folder / "E=8.json", folder / "E=8_down.json"
    rows = {config_table.read(path)[64].block_m for path in (up, down) if path.exists()}
    assert len(rows) == 1
    write_pair(folder, 32)
    assert [it.name for it in folder.iterdir() if it.name.startswith(".")] == []
    assert {config_table.read(path)[64].block_m for path in (up, down)} == {32}


def test_rel_07_a_down_table_that_a_killed_run_set_aside_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.STORE, str(tmp_path / "store"))
    folder = tmp_path / "triton_3_7_1"
    folder.mkdir()
    write_pair(folder, 16)
    down, other = folder / "E=8_down.json", folder / "E=9.json"
    down.rename(files.set_aside(down))
    merge.put({other: StoredTable({64: TileConfig(16, 64, 64, 1, 4, 3)}, None)})
    assert config_table.read(down)[64].block_m == 16
    assert not files.set_aside(down).exists()


def test_rel_07_no_file_but_our_own_is_ever_removed(tmp_path: Path) -> None:
    of_this_process = f".sglang_moe_ext.0.{os.getpid()}.abc.tmp"
    theirs = [".abcdefgh.tmp", ".sglang_moe_ext.tmp", ".sglang_moe_ext.1.x.y.tmp", "a.tmp", of_this_process]
    for name in theirs:
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path)
    assert sorted(it.name for it in tmp_path.iterdir()) == sorted(theirs)


# rel-08


def test_rel_08_a_lock_that_another_holds_is_named_and_given_up_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "SAY_AFTER_S", 0.05)
    monkeypatch.setattr(locks, "GIVE_UP_AFTER_S", 0.3)
    held = files.hold(tmp_path / "a.lock", wait=False)
    assert held is not None
    started = time.monotonic()
    with held, pytest.raises(StoreError, match=r"a\.lock"):
        locks.wait_for(tmp_path / "a.lock", what="run this")
    assert time.monotonic() - started < 30
    (line,) = caplog.messages
    assert str(tmp_path / "a.lock") in line


def test_a_lock_that_is_given_back_is_taken(tmp_path: Path) -> None:
    held = files.hold(tmp_path / "a.lock", wait=False)
    assert held is not None
    threading.Timer(0.1, held.close).start()
    locks.wait_for(tmp_path / "a.lock", what="run this").close()


# rel-09


BLOCKS: list[Any] = [[None, None], ["a", "b"], [None], [128], 7, [[128], [128]], [128, None], object(), {"a": 1}]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda it: "an object" if type(it) is object else repr(it))
def test_rel_09_a_block_of_scales_that_is_none_is_the_engines_to_answer(block: Any) -> None:
    engine = stand_in.Engine()
    assert engine.lookup(stand_in.W1, stand_in.W2, 2, None, 64, block_shape=block) == stand_in.THEIRS


@pytest.mark.parametrize("row", [None, 7, "64", [16, 64, 64]], ids=repr)
def test_a_row_of_the_engines_table_that_is_no_entry_leaves_its_default(row: Any) -> None:
    engine = stand_in.Engine()

    def own(*_: Any, **__: Any) -> Any:
        return row

    hook = stand_in.sglang_lookup_hook.lookup_hook(replace(engine.resolver.engine, lookup=own), engine.resolver)
    assert hook(stand_in.W1, stand_in.W2, 2, None, 64) == stand_in.DEFAULT


# rel-10


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(env.STORE, raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", refuse)


@pytest.mark.usefixtures("homeless")
def test_rel_10_a_user_without_a_home_is_told_which_variable_to_set() -> None:
    with pytest.raises(StoreError, match=env.STORE):
        list(user_store.all_tables("sglang"))
    assert user_store.root_if_any() is None
    with user_store.locked([Path()]):
        pass


@pytest.mark.parametrize(
    "store", ["x" * 300, "/proc/1/nothing", "/dev/null"], ids=["300 letters", "closed", "a device"]
)
def test_a_store_that_cannot_be_read_has_no_tables_or_one_line(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.STORE, store)
    try:
        assert list(user_store.all_tables("sglang")) == []
    except StoreError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    with user_store.locked([Path()]):
        pass


# F13


def test_an_engine_file_that_is_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fused_moe.py")
    with pytest.raises(Exception, match="no regular file"):
        source_patch._read(tmp_path / "fused_moe.py")


# F15


def test_threads_that_attach_at_once_wrap_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "_states", {})
    put_in: list[int] = []

    def install(*_: object) -> Any:
        time.sleep(0.01)
        put_in.append(1)

    monkeypatch.setattr(attach, "why_off", lambda _: None)
    monkeypatch.setattr(attach, "hooks_of", lambda _: attach.EngineHooks("", lambda *_: False, install))
    layer = ModuleType(LAYER_MODULES[0])
    threads = [threading.Thread(target=attach.attach, args=(layer, "a thread")) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(put_in) == 1
    assert attach.state().is_active


# Arguments of releases to come


def test_vllms_lookup_may_get_new_arguments_with_defaults_and_no_others() -> None:
    def later(w1_shape: Any, w2_shape: Any, top_k: Any, new: int = 1) -> None:
        """As a later release may have it."""

    def other(w1_shape: Any, w2_shape: Any, top_k: Any, new: int) -> None:
        """What no hook can answer for."""

    known = ("w1_shape", "w2_shape", "top_k")
    assert vllm_hook_points._takes(later, known)
    assert not vllm_hook_points._takes(other, known)
    assert not vllm_hook_points._takes(later, ("w2_shape", "w1_shape"))
