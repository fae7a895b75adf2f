"""What benchmarks/vllm_layer.py makes of the documents that two runs of tune end with; no GPU is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import vllm_layer
from sglang_moe_ext.core import MoEExtError

RAN = {"us": 306.3, "gain": 1.0, "low": 1.0, "high": 1.0, "error": 4e-3, "right": True, "failure": None}
FASTER = RAN | {"us": 200.0, "gain": 1.53, "low": 1.5, "high": 1.56}
FAILED = RAN | {"us": None, "right": False, "failure": "OutOfResources: shared memory"}


@pytest.mark.parametrize(
    ("stock", "tuned", "said"),
    [
        (RAN, FASTER, "| layer | 64 | 306.3 | 200.0 | 1.530 [1.500, 1.560] |"),
        (RAN, FASTER | {"right": False, "error": 0.5}, "WRONG 0.004 0.5 |"),
        (FAILED, FASTER, "| OutOfResources: shared memory |"),
    ],
    ids=["ran", "wrong", "stock fails"],
)
def test_a_row_tells_what_became_of_both(stock: dict[str, Any], tuned: dict[str, Any], said: str) -> None:
    (row,) = vllm_layer.rows("layer", [{"m": 64, "choices": [stock, tuned]}])
    assert row.endswith(said)


def test_the_table_that_was_tuned_is_raced_on_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[str]] = []
    table = tmp_path / "tables" / "E=1.json"

    def tune(arguments: Sequence[str], out: Path, log: Path) -> dict[str, Any]:
        asked.append(arguments)
        return {"written": [str(table), str(tmp_path / "store" / "E=1.json")], "comparisons": []}

    monkeypatch.setattr(vllm_layer, "tune", tune)
    vllm_layer.raced(("--model", "x"), (1, 64), 30.0, tmp_path, tmp_path / "log")
    tuning, racing = asked
    assert "--save-dir" in tuning and "--seed" not in tuning
    assert racing[racing.index("--cmp-configs") + 1] == str(table)
    assert racing[racing.index("--seed") + 1] != "0"


def test_a_layer_without_a_table_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_layer, "tune", lambda *_: {"written": []})
    with pytest.raises(MoEExtError, match="wrote no table"):
        vllm_layer.raced(("--model", "x"), (1,), 30.0, tmp_path, tmp_path / "log")
