"""Keep the table of built-in models in docs/models.md as the code has it.

usage: python tools/model_table.py [--check]      (from the project's folder; --check only compares)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from sglang_moe_ext.core import ModelError, Parallelism
from sglang_moe_ext.engines.sglang import table_names
from sglang_moe_ext.engines.sglang.sharding import launched_shape
from sglang_moe_ext.engines.vllm import sharding as vllm_sharding
from sglang_moe_ext.engines.vllm import table_names as vllm_naming
from sglang_moe_ext.models import builtin_models

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- models: made by tools/model_table.py -->\n", "<!-- end of models -->\n"
GPU = "<GPU>"


def rows() -> Iterator[str]:
    """A line of markdown for each model: tensor-parallel size 1, the weights that its checkpoint publishes."""
    one = Parallelism()
    for model in builtin_models().values():
        try:
            ours = table_names.file_name(table_names.table_key(launched_shape(model, one), GPU))
        except ModelError:
            ours = "-"
        vllm = vllm_naming.file_name(vllm_naming.table_key(vllm_sharding.launched_shape(model, one), GPU))
        yield f"| {model.name} | `{ours}` | `{vllm}` |"


def table() -> str:
    head = "| model | SGLang | vLLM |\n|---|---|---|\n"
    return BEGIN + head + "\n".join(rows()) + "\n" + END


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    current = BEGIN + rest.split(END)[0] + END
    if current == table():
        return
    if "--check" in sys.argv:
        sys.exit("docs/models.md: the table of models is out of date: run python tools/model_table.py")
    DOCUMENT.write_text(before + table() + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
