"""What keeps our hooks out of a process, and that putting them in never raises; real engines: engines/test_hooks.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from sglang_moe_ext import env
from sglang_moe_ext.engines.sglang import hook_points
from sglang_moe_ext.engines.sglang.hook_points import LAYER_MODULES
from sglang_moe_ext.engines.vllm.installation import LAYER_MODULE
from sglang_moe_ext.serving import attach, guard, plugin

PLUGINS, VLLM_PLUGINS = "SGLANG_PLUGINS", "VLLM_PLUGINS"
LAYER = ModuleType(LAYER_MODULES[0])
Way = Callable[[], None]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that nothing has been hooked in, and that no variable keeps us out of."""
    monkeypatch.setattr(attach, "_states", {})
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for variable in (env.DISABLE, PLUGINS, VLLM_PLUGINS):
        monkeypatch.delenv(variable, raising=False)
    guard.warn_once.cache_clear()
    yield
    guard.warn_once.cache_clear()


@pytest.mark.parametrize(
    ("variable", "value", "is_off"),
    [
        (env.DISABLE, "", False),
        (env.DISABLE, "0", False),
        (env.DISABLE, "1", True),
        (PLUGINS, "", False),
        (PLUGINS, "sglang_moe_ext", False),
        (PLUGINS, "another , sglang_moe_ext", False),
        (PLUGINS, "another", True),
        (PLUGINS, "sglang_moe_ext_too", True),
    ],
)
def test_two_variables_keep_us_out(variable: str, value: str, is_off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    why = attach.why_off(attach.hooks_of("sglang"))
    assert (why is not None) == is_off
    assert why is None or variable in why


@pytest.mark.parametrize(
    ("value", "is_off"),
    [
        ("sglang_moe_ext", False),
        ("another,sglang_moe_ext", False),
        ("", True),
        ("another", True),
        ("a, sglang_moe_ext", True),
    ],
)
def test_vllms_list_of_plugins_is_read_as_vllm_reads_it(
    value: str, is_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VLLM_PLUGINS, value)
    assert (attach.why_off(attach.hooks_of("vllm")) is not None) == is_off


def test_without_a_list_of_plugins_vllm_loads_us() -> None:
    assert attach.why_off(attach.hooks_of("vllm")) is None


def test_what_keeps_us_out_is_the_state_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.DISABLE, "1")
    assert attach.attach(LAYER, "a test") == attach.state() == attach.HookState(False, f"{env.DISABLE} is set")


def test_without_an_engine_we_are_off_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hook_points.installation, "find", lambda: None)
    for _ in range(2):
        assert not attach.attach(LAYER, "a test").is_active
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("error", [RuntimeError("broken"), ImportError("broken"), AttributeError("broken")], ids=repr)
def test_whatever_is_broken_attaching_never_raises(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(_: ModuleType) -> None:
        raise error

    monkeypatch.setattr(hook_points, "locate", breaks)
    plugin.attach_engine(LAYER, "a test")
    assert f"is off, the engine runs as it is: {type(error).__name__}: broken" in caplog.text


WAYS = [plugin.register_sglang, plugin.attach_patched, plugin.register_vllm]
OF_EACH_WAY = [*["engines.sglang.hook_points"] * 2, "engines.vllm.installation"]


@pytest.mark.parametrize(
    ("way", "module"),
    [*zip(WAYS, OF_EACH_WAY, strict=True), *((way, "serving.attach") for way in WAYS)],
)
def test_an_installation_of_ours_that_is_broken_ends_no_server(
    module: str, way: Way, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parent, _, name = f"sglang_moe_ext.{module}".rpartition(".")
    monkeypatch.delattr(sys.modules[parent], name)
    monkeypatch.setitem(sys.modules, f"{parent}.{name}", None)
    for name in (LAYER_MODULES[0], LAYER_MODULE):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    way()
    (line,) = caplog.messages
    assert "is off, the engine runs as it is" in line


def test_the_startup_file_waits_for_the_modules_that_are_hooked() -> None:
    from sglang_moe_ext import startup

    assert (*LAYER_MODULES, LAYER_MODULE) == startup.LAYER_MODULES


@pytest.mark.parametrize(("way", "modules"), zip(WAYS, [*[LAYER_MODULES] * 2, (LAYER_MODULE,)], strict=True))
def test_an_engine_that_is_not_imported_yet_is_waited_for(
    way: Way, modules: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_moe_ext.import_hook import ImportHook

    monkeypatch.setattr(sys, "meta_path", [it for it in sys.meta_path if not isinstance(it, ImportHook)])
    way()
    (finder,) = (it for it in sys.meta_path if isinstance(it, ImportHook))
    assert set(finder.awaited) == set(modules)
