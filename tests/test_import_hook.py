"""Modules are acted on as soon as they have been executed, and every import goes on as it would without us."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sglang_moe_ext import import_hook
from sglang_moe_ext.import_hook import ImportHook

NAME = "a_module_that_arrives"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, in a process that awaits nothing yet and forgets what it imports."""
    monkeypatch.setattr(sys, "meta_path", [it for it in sys.meta_path if not isinstance(it, ImportHook)])
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(place: Path, text: str, name: str = NAME) -> None:
    place.joinpath(f"{name}.py").write_text(text, encoding="utf-8")
    importlib.invalidate_caches()


def nobody(module: ModuleType) -> None:
    raise AssertionError(module)


def test_a_module_is_acted_on_once_it_has_been_executed(place: Path) -> None:
    write(place, "VALUE = 1")
    met: list[int] = []
    import_hook.on_import(NAME, lambda module: met.append(module.VALUE))
    importlib.import_module(NAME)
    assert met == [1]


def test_it_is_acted_on_before_whoever_imports_it_goes_on(place: Path) -> None:
    write(place, "VALUE = 1")
    write(place, f"from {NAME} import VALUE", "importer")
    import_hook.on_import(NAME, lambda module: setattr(module, "VALUE", 2))
    assert importlib.import_module("importer").VALUE == 2


def test_it_is_acted_on_before_the_rest_of_a_package_that_imports_it(place: Path) -> None:
    (place / "package").mkdir()
    write(place / "package", "from package.inner import VALUE; REST = VALUE", "__init__")
    write(place / "package", "VALUE = 1", "inner")
    import_hook.on_import("package.inner", lambda module: setattr(module, "VALUE", 2))
    assert importlib.import_module("package").REST == 2


def test_a_second_import_of_it_is_not_acted_on(place: Path) -> None:
    write(place, "")
    met: list[ModuleType] = []
    import_hook.on_import(NAME, met.append)
    assert [importlib.import_module(NAME) for _ in range(2)] == met * 2


def test_who_was_first_to_expect_a_module_acts_on_it(place: Path) -> None:
    write(place, "")
    met: list[str] = []
    import_hook.on_import(NAME, lambda _: met.append("first"))
    import_hook.on_import(NAME, lambda _: met.append("second"))
    importlib.import_module(NAME)
    assert met == ["first"]


def test_many_that_wait_share_one_finder(place: Path) -> None:
    for name in (NAME, "another", "a third"):
        import_hook.on_import(name, nobody)
    assert [type(it) for it in sys.meta_path].count(ImportHook) == 1


def test_other_modules_are_found_by_others(place: Path) -> None:
    import_hook.on_import(NAME, nobody)
    assert ImportHook.find_spec(sys.meta_path[0], "json") is None  # type: ignore[arg-type]


def test_a_module_that_is_not_there_is_missing_as_ever(place: Path) -> None:
    import_hook.on_import(NAME, nobody)
    with pytest.raises(ModuleNotFoundError, match=NAME):
        importlib.import_module(NAME)


@pytest.mark.parametrize(("text", "error"), [("raise KeyError('its own')", KeyError), ("def", SyntaxError)])
def test_a_module_that_fails_fails_with_its_own_error(place: Path, text: str, error: type[Exception]) -> None:
    write(place, text)
    import_hook.on_import(NAME, nobody)
    with pytest.raises(error):
        importlib.import_module(NAME)


def test_an_error_in_the_finder_leaves_the_import_to_others(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("broken")

    import_hook.on_import(NAME, nobody)
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", breaks)
    assert sys.meta_path[0].find_spec(NAME, None) is None


def test_a_folder_that_is_a_namespace_is_imported_as_ever(place: Path) -> None:
    (place / NAME).mkdir()
    import_hook.on_import(NAME, nobody)
    importlib.invalidate_caches()
    assert importlib.import_module(NAME).__file__ is None


def test_a_module_in_a_zip_file_is_acted_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(place / "archive.zip", "w") as archive:
        archive.writestr(f"{NAME}.py", "VALUE = 1")
    monkeypatch.syspath_prepend(place / "archive.zip")
    met: list[ModuleType] = []
    import_hook.on_import(NAME, met.append)
    assert [importlib.import_module(NAME)] == met


def test_a_module_that_is_loaded_again_is_acted_on_again(place: Path) -> None:
    write(place, "VALUE = 1")
    import_hook.on_import(NAME, lambda module: setattr(module, "VALUE", 2))
    module = importlib.import_module(NAME)
    module.VALUE = 3
    assert importlib.reload(module).VALUE == 2


def test_its_source_can_still_be_read(place: Path) -> None:
    write(place, "VALUE = 1")
    import_hook.on_import(NAME, lambda _: None)
    spec = importlib.import_module(NAME).__spec__
    assert spec is not None
    assert spec.loader.get_source(NAME) == "VALUE = 1"  # type: ignore[union-attr]
