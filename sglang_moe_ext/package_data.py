"""Where the folders lie that ship with the package: in the wheel inside it, in a checkout beside it."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def folder(name: str, package: Path = _PACKAGE) -> Path | None:
    """The folder that a checkout has under that name (`patches`, `tuned_configs`), or None where it was not shipped."""
    checkout = package.parent
    # What lies beside an installed package is somebody else's, whatever its name.
    beside = [checkout / name] if (checkout / "pyproject.toml").is_file() else []
    return next((place for place in (package / f"_{name}", *beside) if place.is_dir()), None)
