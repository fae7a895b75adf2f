"""A folder for PYTHONPATH with the entry points that an installation of this checkout would have.

SGLang finds plugins by the metadata of installed packages; a checkout on PYTHONPATH has none. A second plugin puts the
weights of `dummy_weights` in the place of the engine's, with and without ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sglang_moe_ext import __version__, import_hook

GROUP, VLLM_GROUP = "sglang.srt.plugins", "vllm.general_plugins"
OURS = "sglang_moe_ext.serving.plugin:register_sglang"
WEIGHTS = "benchmarks.serving.plugin_site:register_weights"
VLLM_OURS = "sglang_moe_ext.serving.plugin:register_vllm"
VLLM_WEIGHTS = "benchmarks.serving.plugin_site:register_vllm_weights"


def write(folder: Path, *, spread_weights: bool, more: Mapping[str, str] | None = None) -> None:
    """As pip would write it for our package, and for a package that brings the weights.

    `more`: further packages by name, each with the function that its entry point names.
    """
    packages = {**({"spread_dummy_weights": WEIGHTS} if spread_weights else {}), **(more or {})}
    _metadata(folder, "sglang_moe_ext", __version__, OURS)
    for name, function in packages.items():
        _metadata(folder, name, "0", function)


def write_for_vllm(folder: Path) -> None:
    """The same for vLLM, with the weights."""
    _metadata(folder, "sglang_moe_ext", __version__, VLLM_OURS, VLLM_GROUP)
    _metadata(folder, "spread_dummy_weights", "0", VLLM_WEIGHTS, VLLM_GROUP)


def _metadata(folder: Path, name: str, version: str, function: str, group: str = GROUP) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {function}\n", encoding="utf-8")


def register_weights() -> None:
    """Entry point: each process of a server calls it, and only the one that loads the model needs it."""
    from benchmarks.serving import dummy_weights

    _register(dummy_weights.LOADER)


def register_vllm_weights() -> None:
    """Entry point, as `register_weights`."""
    from benchmarks.serving import dummy_weights

    _register(dummy_weights.VLLM_LOADER)


def _register(loader: str) -> None:
    import sys

    from benchmarks.serving import dummy_weights

    if loader in sys.modules:
        dummy_weights.put_in_place(loader)
    else:
        import_hook.on_import(loader, lambda _: dummy_weights.put_in_place(loader))
