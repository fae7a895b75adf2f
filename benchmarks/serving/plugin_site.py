"""A folder for PYTHONPATH with the entry points that an installation of this checkout would have.

SGLang finds plugins by the metadata of installed packages; a checkout on PYTHONPATH has none. A second plugin puts the
weights of `dummy_weights` in the place of the engine's, with and without ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sglang_moe_ext import __version__, import_hook

GROUP = "sglang.srt.plugins"
OURS = "sglang_moe_ext.serving.plugin:register_sglang"
WEIGHTS = "benchmarks.serving.plugin_site:register_weights"


def write(folder: Path, *, spread_weights: bool, more: Mapping[str, str] | None = None) -> None:
    """As pip would write it for our package, and for a package that brings the weights.

    `more`: further packages by name, each with the function that its entry point names.
    """
    packages = {**({"spread_dummy_weights": WEIGHTS} if spread_weights else {}), **(more or {})}
    _metadata(folder, "sglang_moe_ext", __version__, OURS)
    for name, function in packages.items():
        _metadata(folder, name, "0", function)


def _metadata(folder: Path, name: str, version: str, function: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {function}\n", encoding="utf-8")


def register_weights() -> None:
    """Entry point: each process of a server calls it, and only the one that loads the model needs it."""
    import sys

    from benchmarks.serving import dummy_weights

    if dummy_weights.LOADER in sys.modules:
        dummy_weights.put_in_place()
    else:
        import_hook.on_import(dummy_weights.LOADER, lambda _: dummy_weights.put_in_place())
