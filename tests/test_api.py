"""The Python interface: its examples run, and nothing else is public."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest

from sglang_moe_ext import api
from sglang_moe_ext.gpu import specs


@pytest.fixture(autouse=True)
def no_engine_and_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(specs, "detect", lambda: None)
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


EXAMPLES = [it for it in doctest.DocTestFinder().find(api, globs=vars(api)) if it.examples]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda it: it.name.rpartition(".")[2])
def test_an_example_of_the_documentation_runs(example: doctest.DocTest) -> None:
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    assert runner.run(example, out=said.append, clear_globs=False).failed == 0, "".join(said)


def test_every_function_has_an_example() -> None:
    functions = {name for name in api.__all__ if inspect.isfunction(getattr(api, name))}
    assert {it.name.rpartition(".")[2] for it in EXAMPLES} == functions == set(api.__all__) - {"Layer"}


@pytest.mark.parametrize("name", api.__all__)
def test_what_is_public_is_documented_and_typed(name: str) -> None:
    public = getattr(api, name)
    assert public.__doc__
    assert "Any" not in str(inspect.signature(public))
