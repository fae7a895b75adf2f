"""What tuning is worth, with what runs today asked from a real SGLang's own lookup."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_moe_ext import api
from sglang_moe_ext.gpu import specs
from tests.engines.installed import ENGINES_DIR

SGLANG = ENGINES_DIR / "sglang" / "0.5.23"


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(SGLANG))
    monkeypatch.setenv("PYTHONPATH", str(SGLANG))
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(specs, "detect", lambda: None)


@pytest.mark.parametrize(
    ("gpu", "basis", "origin"),
    [("H200", "tuned already", "measured"), ("L40S", "predicted", None)],
    ids=["a shipped table", "the engine's default"],
)
def test_the_engine_says_whose_configuration_runs_today(gpu: str, basis: str, origin: str | None) -> None:
    found = api.weigh(api.resolve("Qwen3-30B-A3B"), gpu, tokens=[4096])
    (row,) = found.rows
    assert found.is_asked
    assert row.source is not None
    assert (row.tuning.basis, row.source.origin) == (basis, origin)
    assert (row.source.gain is not None) == (origin == "measured"), "the figure beside the shipped table"
