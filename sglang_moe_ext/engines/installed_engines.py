"""Which release of an engine is installed, and with which Triton it will run; imports neither."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path


def parse_version(text: str) -> tuple[int, int, int]:
    """(0, 5, 10) of "0.5.10.post1"; zeros where the text has no number."""
    numbers = [int(number) for number in re.findall(r"\d+", text)[:3]]
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    return major, minor, patch


def find_distribution(package: str) -> tuple[str, Path] | None:
    """The version of that package by its metadata, and the folder that `import` would load it from, or None."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        version_text = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return version_text, Path(next(iter(spec.submodule_search_locations))).resolve()


def running_triton() -> str | None:
    """The `triton.__version__` that the engine will see, read without importing Triton."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    match = re.search(
        r"^__version__ = ['\"]([^'\"]+)['\"]", Path(spec.origin).read_text(encoding="utf-8"), re.MULTILINE
    )
    return match[1] if match else importlib.metadata.version("triton")
