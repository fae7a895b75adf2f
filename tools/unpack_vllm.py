"""Unpack of vLLM's wheel what runs without a GPU: its Python, its JSON tables and what names it. usage: WHEEL FOLDER

The compiled operators left out are 95 % of it; vLLM says that it misses them, and goes on.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path


def unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        wanted = [name for name in archive.namelist() if name.endswith((".py", ".json")) or ".dist-info/" in name]
        archive.extractall(folder, wanted)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
