"""A launch that Triton refuses is made smaller, remembered, and said once; every other error is the engine's.

No GPU refuses here: a stand-in for the engine's launcher does, with the error that Triton raises. What a real GPU
refuses is measured by benchmarks/small_card.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from sglang_moe_ext.core import TileConfig
from sglang_moe_ext.engines import config_dict
from sglang_moe_ext.engines.sglang.hook_points import CONFIG_POSITION
from sglang_moe_ext.serving import guard, launch_guard
from sglang_moe_ext.serving.launch_guard import GuardedLauncher as Launch

LARGE = TileConfig(128, 256, 64, 16, 8, 4)
WEIGHTS = torch.empty(8, 512, 256, dtype=torch.bfloat16, device="meta")
ROWS = torch.empty(64, 256, dtype=torch.bfloat16, device="meta")


class Launcher:
    """As the engine's: refuses what asks for more bytes than there are, by the static rule of cp.async."""

    def __init__(self, limit: int, error: Exception | None = None) -> None:
        self.limit, self.error = limit, error
        self.asked: list[dict[str, Any]] = []
        self.ran: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.override: dict[str, Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        config = args[CONFIG_POSITION] if len(args) > CONFIG_POSITION else kwargs["config"]
        tile = config_dict.tile_of(config)
        self.asked.append(dict(config))
        if self.error is not None:
            raise self.error
        if (asked := 2 * (tile.block_m + tile.block_n) * tile.block_k * (tile.num_stages - 1)) > self.limit:
            raise OutOfResources(asked, self.limit, "shared memory")
        self.ran.append((args, kwargs))
        return "launched"


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    guard.warn_once.cache_clear()


def hooked(launcher: Launcher) -> Any:
    def invoke_fused_moe_kernel(*args: Any, **kwargs: Any) -> Any:
        return launcher(*args, **kwargs)

    return launch_guard.launch_hook(Launch(invoke_fused_moe_kernel, CONFIG_POSITION, lambda: launcher.override))


def by_position(config: dict[str, Any], weights: torch.Tensor = WEIGHTS) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rest = [f"argument {at}" for at in range(2, CONFIG_POSITION)]
    return (ROWS, weights, *rest, config, "compute_type"), {"block_shape": None}


def by_name(config: dict[str, Any], weights: torch.Tensor = WEIGHTS) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"A": ROWS, "B": weights, "config": config, "compute_type": "compute_type"}


either = pytest.mark.parametrize("call", [by_position, by_name], ids=["by-position", "by-name"])
ENTRY = config_dict.config_dict_of(LARGE) | {"waves_per_eu": 2}


@either
def test_what_fits_is_launched_as_it_was_asked_for(call: Any) -> None:
    launcher = Launcher(200_000)
    args, kwargs = call(ENTRY)
    assert hooked(launcher)(*args, **kwargs) == "launched"
    assert launcher.ran == [(args, kwargs)]


@either
def test_what_is_refused_is_launched_once_and_smaller(call: Any) -> None:
    launcher = Launcher(101_376)
    args, kwargs = call(ENTRY)
    assert hooked(launcher)(*args, **kwargs) == "launched"
    assert len(launcher.ran) == 1
    assert launcher.asked == [ENTRY, ENTRY | {"num_stages": 3}]


@either
def test_all_but_the_configuration_reaches_the_launcher_as_it_was(call: Any) -> None:
    launcher = Launcher(101_376)
    args, kwargs = call(ENTRY)
    hooked(launcher)(*args, **kwargs)
    smaller_args, smaller_kwargs = call(ENTRY | {"num_stages": 3})
    assert launcher.ran == [(smaller_args, smaller_kwargs)]


@either
def test_the_entry_that_was_refused_is_not_changed(call: Any) -> None:
    entry = dict(ENTRY)
    args, kwargs = call(entry)
    hooked(Launcher(101_376))(*args, **kwargs)
    assert entry == ENTRY


@either
def test_the_second_launch_goes_straight_to_what_fitted(call: Any) -> None:
    launcher = Launcher(101_376)
    run = hooked(launcher)
    for _ in range(2):
        args, kwargs = call(dict(ENTRY))
        run(*args, **kwargs)
    assert launcher.asked[2:] == [ENTRY | {"num_stages": 3}]


def test_what_is_remembered_does_not_change_with_what_was_launched() -> None:
    launcher = Launcher(101_376)
    run = hooked(launcher)
    for _ in range(3):
        args, kwargs = by_name(dict(ENTRY))
        run(*args, **kwargs)
        launcher.ran[-1][1]["config"].clear()
    assert launcher.asked[-1] == ENTRY | {"num_stages": 3}


def test_it_is_remembered_for_the_weights_that_it_was_refused_for() -> None:
    launcher = Launcher(101_376)
    run = hooked(launcher)
    for weights in (WEIGHTS, torch.empty(8, 512, 256, dtype=torch.float8_e4m3fn, device="meta")):
        args, kwargs = by_name(ENTRY, weights)
        run(*args, **kwargs)
    assert launcher.asked[2] == ENTRY


def test_an_entry_that_fits_is_launched_as_it_is_after_another_was_refused() -> None:
    launcher = Launcher(101_376)
    run = hooked(launcher)
    small = ENTRY | {"num_stages": 2}
    for entry in (ENTRY, small):
        args, kwargs = by_name(entry)
        run(*args, **kwargs)
    assert launcher.asked[-1] == small


def test_a_refusal_is_said_once_for_all_layers(caplog: pytest.LogCaptureFixture) -> None:
    run = hooked(Launcher(101_376))
    with caplog.at_level(logging.INFO):
        for experts in (8, 8, 16):
            args, kwargs = by_name(ENTRY, WEIGHTS[:1].expand(experts, 512, 256))
            run(*args, **kwargs)
    (line,) = caplog.messages
    assert "Required: 147456" in line


@pytest.mark.parametrize("error", [ValueError("their own"), RuntimeError("CUDA error"), KeyboardInterrupt()], ids=repr)
def test_any_other_error_is_the_engines(error: Exception) -> None:
    launcher = Launcher(101_376, error)
    args, kwargs = by_name(ENTRY)
    with pytest.raises(type(error)) as raised:
        hooked(launcher)(*args, **kwargs)
    assert raised.value is error
    assert len(launcher.asked) == 1


def test_another_error_on_the_way_down_is_the_engines() -> None:
    class Fails(Launcher):
        def __call__(self, *args: Any, **kwargs: Any) -> str:
            self.error = RuntimeError("CUDA error") if self.asked else None
            return super().__call__(*args, **kwargs)

    args, kwargs = by_name(ENTRY)
    with pytest.raises(RuntimeError, match="CUDA error"):
        hooked(Fails(101_376))(*args, **kwargs)


def test_where_all_is_refused_the_first_refusal_is_raised() -> None:
    launcher = Launcher(-1)
    args, kwargs = by_name(ENTRY)
    with pytest.raises(OutOfResources) as raised:
        hooked(launcher)(*args, **kwargs)
    assert raised.value.required == 147_456


def test_inside_the_engines_override_a_refusal_is_raised_untouched() -> None:
    launcher = Launcher(101_376)
    launcher.override = ENTRY
    args, kwargs = by_name(ENTRY)
    with pytest.raises(OutOfResources):
        hooked(launcher)(*args, **kwargs)
    assert launcher.asked == [ENTRY]


def test_a_launch_inside_a_graph_that_torch_compiles_is_the_engines_own() -> None:
    def own(hidden: torch.Tensor, weights: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
        return hidden @ weights * config["num_stages"]

    run = launch_guard.launch_hook(Launch(own, 2, lambda: None, lambda *_: ENTRY | {"num_stages": 2}))
    hidden, weights = torch.ones(2, 4), torch.ones(4, 4)
    compiled = torch.compile(lambda it: run(it, weights, ENTRY), fullgraph=True, backend="eager")
    assert torch.equal(compiled(hidden), own(hidden, weights, ENTRY))


def test_a_call_that_is_not_the_engines_gets_the_engines_answer_after_a_refusal() -> None:
    run = hooked(Launcher(101_376))
    args, kwargs = by_name(ENTRY)
    run(*args, **kwargs)
    with pytest.raises(KeyError, match="config"):
        run(None, None)
