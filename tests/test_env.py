"""The table of environment variables: complete, and the only place that names them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sglang_moe_ext import env

PACKAGE = Path(env.__file__).parent
NAMES = {value for name, value in vars(env).items() if name.isupper() and isinstance(value, str)}


def test_every_variable_has_a_meaning() -> None:
    assert set(env.MEANINGS) == NAMES


@pytest.mark.parametrize(
    ("value", "on"), [(None, False), ("", False), ("0", False), ("False", False), ("1", True), ("yes", True)]
)
def test_a_switch_is_on_for_any_value_but_0(value: str | None, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(env.DISABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(env.DISABLE, value)
    assert env.is_on(env.DISABLE) is on


def test_no_other_module_spells_the_name_of_a_variable() -> None:
    spelt = [
        (path.name, node.value)
        for path in PACKAGE.rglob("*.py")
        if path.name != "env.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in NAMES
    ]
    assert spelt == []
