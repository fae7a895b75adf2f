"""What the function answers that stands in the place of the engine's lookup, with a stand-in for the engine."""

from __future__ import annotations

import json
import logging
import shlex
import timeit
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_moe_ext import env
from sglang_moe_ext.cli import tune
from sglang_moe_ext.core import EngineError, MoEShape, Quantization
from sglang_moe_ext.engines import config_dict
from sglang_moe_ext.engines.lookup_args import lookup_layer
from sglang_moe_ext.engines.sglang.hook_points import SglangHookPoints
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.models import parse_shape
from sglang_moe_ext.serving import guard, sglang_lookup_hook, table_selection
from sglang_moe_ext.serving.table_search import TableDir
from tests.serving.test_table_selection import ENGINES, H200, SHAPE, YOURS, at, config, known, write

DEFAULT = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 8}
THEIRS = DEFAULT | {"GROUP_SIZE_M": 5}
OVERRIDE = DEFAULT | {"GROUP_SIZE_M": 6}
W1, W2 = (8, 512, 512), (8, 512, 256)


class Engine:
    """A lookup that answers as the engine's does, and notes each call; `lookup` is what stands in its place."""

    def __init__(self, table_dirs: Sequence[TableDir] = (), version: str = "0.5.23") -> None:
        self.calls: list[dict[str, Any]] = []
        self.override: dict[str, Any] | None = None
        self.error: Exception | None = None
        self.first_calls = 0
        self.is_deterministic = False
        self.device_name: str | None = H200.device_name
        module: Any = SimpleNamespace(
            get_device_name=lambda: self.device_name,
            get_default_config=lambda *_: dict(DEFAULT),
            get_server_args=lambda: SimpleNamespace(enable_deterministic_inference=self.is_deterministic),
        )
        package: Any = SimpleNamespace(get_config=lambda: self.override)
        found = SglangHookPoints(
            SglangInstallation(version, Path(), "3.7.1"), package, module, module, module, self.own, print, None
        )
        self.resolver = sglang_lookup_hook.ConfigResolver(found, lambda: list(table_dirs), self.at_first_call)
        self.lookup = sglang_lookup_hook.lookup_hook(found, self.resolver)

    def at_first_call(self) -> None:
        self.first_calls += 1

    def own(self, *_: Any, **named: Any) -> Any:
        self.calls.append(named)
        if self.error is not None:
            raise self.error
        entry = self.override or THEIRS
        return (entry, (None, None)) if named.get("return_down_config") else entry

    def up(self, tokens: int = 64) -> Any:
        return self.lookup(W1, W2, 2, None, tokens)

    def pair(self, tokens: int = 64) -> Any:
        return self.lookup(W1, W2, 2, None, tokens, block_shape=None, return_down_config=True)


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    guard.warn_once.cache_clear()


@pytest.fixture
def tuned(tmp_path: Path) -> Engine:
    """An engine beside whose own tables lie some of the user's."""
    up, down = {64: config(1), 4096: config(2, block_m=128)}, {64: config(3), 4096: config(4, block_m=128)}
    write(tmp_path, up, known(up))
    write(tmp_path, down, known(down), down=True)
    return Engine([at(YOURS, tmp_path)])


def test_a_layer_with_a_table_runs_its_entries(tuned: Engine) -> None:
    assert tuned.pair() == (config_dict.config_dict_of(config(1)), (config_dict.config_dict_of(config(3)), 128))


def test_the_engines_lookup_is_not_asked_where_there_is_a_table(tuned: Engine) -> None:
    tuned.pair()
    assert tuned.calls == []


def test_a_layer_without_a_table_runs_what_the_engine_says() -> None:
    engine = Engine()
    assert (engine.up(), engine.pair()) == (THEIRS, (THEIRS, (None, None)))


def test_the_engine_is_asked_as_it_was_called() -> None:
    engine = Engine()
    engine.lookup(W1, W2, 2, "fp8_w8a8", 64, block_shape=[128, 128], per_channel_quant=False, return_down_config=True)
    assert engine.calls == [{"per_channel_quant": False, "return_down_config": True}]


def test_an_answer_that_is_changed_does_not_change_the_next(tuned: Engine) -> None:
    expected = json.dumps(tuned.pair())
    up, (down, _) = tuned.pair()
    up.clear()
    down.clear()
    assert json.dumps(tuned.pair()) == expected


def test_an_answer_of_the_engines_is_a_copy() -> None:
    engine = Engine()
    engine.up().clear()
    assert engine.up() == THEIRS


def test_both_shapes_of_the_answer_are_kept_apart(tuned: Engine) -> None:
    assert (type(tuned.up()), type(tuned.pair()), type(tuned.up())) == (dict, tuple, dict)


def test_the_engines_override_comes_first_and_leaves_nothing_behind(tuned: Engine) -> None:
    before = tuned.up()
    tuned.override = OVERRIDE
    inside = tuned.up(), tuned.up(63)
    tuned.override = None
    assert (inside, tuned.up()) == ((OVERRIDE, OVERRIDE), before)


def test_deterministic_inference_runs_what_the_engine_says(tuned: Engine) -> None:
    tuned.is_deterministic = True
    assert tuned.up() == THEIRS


def test_far_from_the_keys_of_our_table_in_the_engines_folder_its_default_runs(tmp_path: Path) -> None:
    table = {256: config(1), 1024: config(2)}
    write(tmp_path, table, known(table))
    engine = Engine([at(ENGINES, tmp_path)])
    assert [engine.up(tokens) for tokens in (1, 8192)] == [DEFAULT, DEFAULT]
    assert engine.calls == []


def test_a_lookup_of_the_engines_that_fails_is_replaced_by_its_default(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    engine.error = json.JSONDecodeError("a table cut off", "{", 1)
    assert engine.pair() == (DEFAULT, (None, None))
    assert "its own lookup failed: JSONDecodeError" in caplog.text


def test_whatever_fails_in_ours_the_engines_lookup_runs(
    tuned: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(table_selection, "select", breaks)
    assert [tuned.up(tokens) for tokens in (64, 65, 66)] == [THEIRS] * 3
    assert [message for message in caplog.messages if "RuntimeError: broken" in message] == caplog.messages[-1:]


def test_an_engine_that_is_not_set_up_raises_its_own_error() -> None:
    def not_set() -> None:
        raise ValueError("no server arguments")

    engine = Engine()
    engine.resolver._engine.config.get_server_args = not_set  # type: ignore[attr-defined]
    engine.error = ValueError("no server arguments")
    with pytest.raises(ValueError, match="no server arguments"):
        engine.up()


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((list(W1), list(W2), 2, None, 64), {}),
        ((W1, W2, 2, None, 64, False, None, True), {}),
        ((W1, W2, 2, "mxfp4", 64), {}),
        ((W1, (8, 512), 2, None, 64), {}),
    ],
    ids=["lists", "by-position", "a-scheme-unknown", "no-shape"],
)
def test_a_call_that_we_know_nothing_of_is_the_engines(tuned: Engine, args: Any, named: Any) -> None:
    assert tuned.lookup(*args, **named) == THEIRS


def test_a_gpu_without_a_name_runs_what_the_engine_says(tuned: Engine) -> None:
    tuned.device_name = None
    assert tuned.up() == THEIRS


def test_tables_are_looked_at_once_for_each_layer(tuned: Engine, tmp_path: Path) -> None:
    tuned.up()
    for path in tmp_path.rglob("*.json"):
        path.unlink()
    assert tuned.up(4096)["GROUP_SIZE_M"] == 2


def test_a_torch_size_and_a_tuple_are_one_layer(tuned: Engine) -> None:
    assert tuned.lookup(torch.Size(W1), torch.Size(W2), 2, None, 64) == tuned.up()


def test_without_the_down_projection_an_entry_has_no_tma(tmp_path: Path) -> None:
    table = {64: config(1, use_tma=True)}
    write(tmp_path, table, known(table))
    engine = Engine([at(YOURS, tmp_path)])
    assert (engine.up(), engine.pair()[0]) == (
        config_dict.config_dict_of(config(1)),
        config_dict.config_dict_of(table[64]),
    )


def test_one_line_says_once_which_table_a_layer_runs(tuned: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for tokens in (64, 65, 100, 4096):
            tuned.pair(tokens)
    (line,) = caplog.messages
    assert line.startswith(f"sglang-moe-ext: {SHAPE}: your table ")


def test_one_line_names_the_command_where_no_table_was_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine([at(YOURS, tmp_path)])
    with caplog.at_level(logging.INFO):
        for tokens in (64, 65):
            engine.pair(tokens)
    (line,) = [line for line in caplog.messages if "no table was measured" in line]
    words = shlex.split(line.split("`")[1])
    asked = tune.parser().parse_args(words[2:])
    assert words[:2] == ["sglang-moe-ext", "tune"] and parse_shape(asked.shape) == SHAPE


def test_no_line_names_the_command_where_the_start_was_to_tune(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(env.AUTOTUNE, "1")
    with caplog.at_level(logging.INFO):
        Engine([at(YOURS, tmp_path)]).pair()
    assert "no table was measured" not in caplog.text


def test_all_batch_sizes_of_sixty_layers_say_few_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = {256: config(1), 1024: config(2)}
    write(tmp_path, table, known(table))
    engine = Engine([at(ENGINES, tmp_path)])
    with caplog.at_level(logging.INFO):
        for tokens in [*range(1, 5000), *range(1, 5000)]:
            engine.pair(tokens)
    assert len(caplog.messages) == 2


def test_the_first_call_is_noted_once(tuned: Engine) -> None:
    for tokens in (1, 2, 3):
        tuned.up(tokens)
    assert tuned.first_calls == 1


def test_memory_for_answers_is_bounded(tuned: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_lookup_hook, "_MOST_ANSWERS", 8)
    expected = [tuned.up(tokens) for tokens in range(1, 100)]
    assert [tuned.up(tokens) for tokens in range(1, 100)] == expected


def test_a_warm_call_reads_nothing(tuned: Engine) -> None:
    """A blunder costs 20 us and more; benchmarks/serving_speed.py measures what a call costs."""
    w1, w2 = torch.Size(W1), torch.Size(W2)

    def call() -> Any:
        return tuned.lookup(w1, w2, 2, None, 64, block_shape=None, per_channel_quant=False, return_down_config=True)

    call()
    assert min(timeit.repeat(call, number=2000, repeat=15)) / 2000 < 3e-6


SCHEMES = {
    "bf16": (None, None, False, SHAPE),
    "fp8-block": ("fp8_w8a8", [128, 128], False, MoEShape(8, 256, 512, 2, Quantization("fp8_w8a8", (128, 128)))),
    "fp8-channel": ("fp8_w8a8", None, True, MoEShape(8, 256, 512, 2, Quantization("fp8_w8a8", None, True))),
    "int4": ("int4_w4a16", [0, 128], False, MoEShape(8, 512, 512, 2, Quantization("int4_w4a16", (0, 128)))),
}


@pytest.mark.parametrize(("dtype", "block", "per_channel", "shape"), SCHEMES.values(), ids=SCHEMES)
def test_the_arguments_of_a_call_are_one_of_our_shapes(
    dtype: str | None, block: list[int] | None, per_channel: bool, shape: MoEShape
) -> None:
    w1 = (8, 2 * shape.intermediate_size, 512)
    assert lookup_layer(w1, W2, 2, dtype, block, per_channel).shape == shape


def test_a_layer_without_a_gate_is_told_by_its_rows() -> None:
    shape = lookup_layer((8, 256, 512), W2, 2, None, None, False).shape
    assert shape is not None
    assert not shape.gated


@pytest.mark.parametrize("name", ["get_server_args", "get_global_server_args"])
def test_an_engine_says_whether_it_is_deterministic(name: str) -> None:
    module: Any = SimpleNamespace(**{name: lambda: SimpleNamespace(enable_deterministic_inference=True)})
    engine: Any = SimpleNamespace(version_text="0.5.8")
    assert SglangHookPoints(engine, module, module, module, module, print, print, None).is_deterministic()


def test_an_engine_that_says_nowhere_whether_it_is_deterministic_is_named() -> None:
    module: Any = SimpleNamespace()
    engine: Any = SimpleNamespace(version_text="0.6.0")
    with pytest.raises(EngineError, match=r"SGLang 0\.6\.0"):
        SglangHookPoints(engine, module, module, module, module, print, print, None).is_deterministic()


def test_an_amd_gpu_is_known_by_its_own_architecture_and_not_by_the_number_it_shares_with_an_h100() -> None:
    properties = SimpleNamespace(gcnArchName="gfx90a:sramecc+", major=9, minor=0, multi_processor_count=110)
    described = specs.describe("AMD Instinct MI250X", properties)
    assert (described.sm, str(described.target), described.smem_per_block) == (0, "gfx90a", 65_536)
