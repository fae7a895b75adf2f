"""The versions that a measurement depends on, and that tables and journals note."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution, None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """The version of the NVIDIA driver of this machine, None where there is none."""
    try:
        said = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    version = re.search(r"\d+(\.\d+)+", said)
    return None if version is None else version[0]
