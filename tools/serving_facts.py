"""Keep docs/sglang-releases.md as the sources of the unpacked SGLang releases have it.

usage: python -m tools.serving_facts [--check]      (from the project's folder; --check only compares)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from sglang_moe_ext.engines.sglang import installation
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from tools.engine_facts import BESIDE_SERVERS, CALLS, Facts, read

ROOT = Path(__file__).resolve().parents[1]
ENGINES = Path(os.environ.get("SGLANG_MOE_EXT_ENGINES", ROOT / ".engines")) / "sglang"
DOCUMENT = ROOT / "docs" / "sglang-releases.md"

HEAD = """\
# What serving relies on in each release of SGLang

Made by `python -m tools.serving_facts` from the sources of each release; a test fails where it differs.

"""


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _grid(columns: list[str], rows: Iterable[Iterable[str]]) -> str:
    return _row(columns) + "|" + "---|" * len(columns) + "\n" + "".join(_row(row) for row in rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _beside(file: str, one: Facts) -> str:
    if file in one.uncalled:
        return "not called"
    return "called" if any(call.startswith(f"{file}: ") for call in one.calls) else "no such file"


def document(facts: list[Facts]) -> str:
    """The page, in markdown."""
    columns: dict[str, Callable[[Facts], str]] = {
        "SGLang": lambda one: one.release,
        "has `sglang.srt.plugins`": lambda one: _yes(one.has_plugins),
        "package of the layer module `fused_moe`": lambda one: f"`{one.layer_package}`",
        "module of the kernel": lambda one: f"`{one.kernel_module}`",
        "`USE_TMA` in an up table": lambda one: "known" if one.knows_up_tma else "reaches the kernel, which raises",
        "another `BLOCK_SIZE_M` in the down table": lambda one: "raises" if one.asserts_one_block_m else "is replaced",
        "without a down table": lambda one: "the up table" if one.reuses_up_table else "the up configuration of that M",
        "lookup takes `per_channel_quant`": lambda one: _yes(one.lookup_takes_per_channel),
        "tables of other Tritons": lambda one: "of a fixed list" if one.tritons_are_listed else "all, the newest first",
        "`--enable-return-routed-experts`": lambda one: _yes(one.returns_routed_experts),
    }
    sites = sorted({call for one in facts for call in one.calls})
    releases = [one.release for one in facts]
    return "".join(
        (
            HEAD,
            _grid(list(columns), ([cell(one) for cell in columns.values()] for one in facts)),
            f"\n## Where `{CALLS}()` is called, which calls our entry point\n\n",
            _grid(["", *releases], ([f"`{site}`", *(_yes(site in one.calls) for one in facts)] for site in sites)),
            "\n## Where an engine is built beside servers\n\nWhere it is not called, the startup file reaches.\n\n",
            _grid(["", *releases], ([f"`{file}`", *(_beside(file, one) for one in facts)] for file in BESIDE_SERVERS)),
        )
    )


def all_facts() -> list[Facts]:
    """Of each unpacked release, the oldest first."""
    roots = sorted(ENGINES.iterdir(), key=lambda folder: installation.parse_version(folder.name))
    return [read(SglangInstallation(folder.name, folder / "sglang", triton=None)) for folder in roots]


def main() -> None:
    made = document(all_facts())
    if DOCUMENT.is_file() and DOCUMENT.read_text(encoding="utf-8") == made:
        return
    if "--check" in sys.argv:
        sys.exit(f"{DOCUMENT.relative_to(ROOT)} is out of date: run python -m tools.serving_facts")
    DOCUMENT.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
