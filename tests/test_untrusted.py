"""Text of strangers on the way to a terminal or a log."""

from __future__ import annotations

import pytest

from sglang_moe_ext.untrusted import LIMIT, show


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("GLM-4.7-Flash", "GLM-4.7-Flash"),
        ("模型", "模型"),
        ("a\nb\r", r"a\nb\r"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("\ud800", r"\ud800"),
        ("a\x00b", r"a\x00b"),
        (b"\xffE=8\n", r"\xffE=8\n"),
        (ValueError("two\nlines"), r"two\nlines"),
        (ValueError(), "ValueError"),
        (None, "None"),
        (128, "128"),
        (["a\n"], r"['a\n']"),
    ],
)
def test_a_value_is_shown_on_one_printable_line(value: object, shown: str) -> None:
    assert show(value) == shown
    assert show(value).isprintable()


@pytest.mark.parametrize(
    "value",
    ["x" * 3_000_000, "\x1b" * 3_000_000, b"\xff" * 3_000_000, "\n" * LIMIT, ["x" * 10**6] * 10**6, 10**100_000],
    ids=["letters", "escapes", "bytes", "as many escapes as letters fit", "a list", "an integer"],
)
def test_no_value_is_longer_than_the_limit(value: object) -> None:
    assert len(show(value)) <= LIMIT
    assert len(show(value, limit=20)) <= 20


def test_a_shortened_text_says_how_long_it_was() -> None:
    assert show("x" * 3_000_000).endswith("x... (3000000 characters)")


def test_an_error_that_cannot_be_printed_is_named_by_its_class() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert show(Mute()) == "Mute"


def test_a_value_nested_without_end_is_shown() -> None:
    nested: list[object] = []
    nested.append(nested)
    assert show(nested) == "[[[[...]]]]"
