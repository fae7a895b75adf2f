"""Patch files of SGLang's layer module: which one is an installation's, whether it is in, put in, taken out.

Each only inserts lines, so it holds nothing of the engine, and taking it out leaves the engine's file byte for byte.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import site
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sglang_moe_ext import package_data
from sglang_moe_ext.core import EngineError, TableError
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.tables import files

NAME = "0001-attach-sglang-moe-ext.patch"
State = Literal["not applied", "applied", "unknown contents"]

_PATCH = re.compile(
    rb".*^before: (?P<before>[0-9a-f]{64})\nafter: (?P<after>[0-9a-f]{64})\n\n"
    rb"--- a/sglang/(?P<target>\w+(?:/\w+)*\.py)\n\+\+\+ b/sglang/(?P=target)\n"
    rb"@@ -(?P<line>\d{1,6}),0 \+\d+,\d+ @@\n(?P<inserted>(?:\+[^\n]*\n)+)",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class SourcePatch:
    """Lines to insert after line `line` of `target`, a path in the engine's package; SHA-256 of it before and after."""

    release: str
    target: str
    line: int
    inserted: bytes
    before: str
    after: str

    def file(self, engine: SglangInstallation) -> Path:
        return engine.root / self.target


def parse(release: str, text: bytes) -> SourcePatch:
    """The patch that a file of ours holds.

    Raises:
        EngineError: it is none.
    """
    match = _PATCH.fullmatch(text)
    if match is None:
        raise EngineError(f"the patch for SGLang {release} is damaged: install sglang-moe-ext again")
    lines = match["inserted"].splitlines(keepends=True)
    return SourcePatch(
        release,
        match["target"].decode(),
        int(match["line"]),
        b"".join(line[1:] for line in lines),
        match["before"].decode(),
        match["after"].decode(),
    )


def find(engine: SglangInstallation) -> SourcePatch:
    """The patch for that release.

    Raises:
        EngineError: there is none, or it is damaged.
    """
    folder = package_data.folder("patches")
    releases = {} if folder is None else {path.parent.name: path for path in folder.glob(f"sglang/*/{NAME}")}
    path = releases.get(engine.version_text)
    if path is None:
        known = ", ".join(sorted(releases, key=lambda text: [int(part) for part in re.findall(r"\d+", text)])) or "none"
        raise EngineError(
            f"no patch for SGLang {engine.version_text} (there is one for: {known}); "
            "`pip install sglang-moe-ext` into the engine's own environment needs none"
        )
    return parse(engine.version_text, path.read_bytes())


def state(patch: SourcePatch, engine: SglangInstallation) -> State:
    """What the engine's file holds.

    Raises:
        EngineError: it cannot be read.
    """
    return _state(patch, _read(patch.file(engine)))


def apply(patch: SourcePatch, engine: SglangInstallation) -> bool:
    """Put the lines in; False where they are in already.

    Raises:
        EngineError: the file is not the release's, or cannot be written; nothing has changed.
    """
    return _change(patch, engine, "applied", _with)


def revert(patch: SourcePatch, engine: SglangInstallation) -> bool:
    """Take the lines out; False where they are not in.

    Raises:
        EngineError: the file is not the release's, or cannot be written; nothing has changed.
    """
    return _change(patch, engine, "not applied", _without)


def _change(
    patch: SourcePatch, engine: SglangInstallation, wanted: State, change: Callable[[SourcePatch, bytes], bytes]
) -> bool:
    file = patch.file(engine)
    contents = _read(file)
    found = _state(patch, contents)
    if found == wanted:
        return False
    changed = change(patch, contents)
    if found == "unknown contents" or _state(patch, changed) != wanted:
        raise EngineError(
            f"{file} is not the file of SGLang {patch.release}, with the patch or without: nothing changed; "
            f"`pip install --force-reinstall --no-deps sglang=={patch.release}` brings that back"
        )
    _replace(file, changed)
    return True


def _with(patch: SourcePatch, contents: bytes) -> bytes:
    lines = contents.splitlines(keepends=True)
    return b"".join((*lines[: patch.line], patch.inserted, *lines[patch.line :]))


def _without(patch: SourcePatch, contents: bytes) -> bytes:
    before, _, after = contents.partition(patch.inserted)
    return before + after


def _state(patch: SourcePatch, contents: bytes) -> State:
    digest = hashlib.sha256(contents).hexdigest()
    states: dict[str, State] = {patch.before: "not applied", patch.after: "applied"}
    return states.get(digest, "unknown contents")


def _read(file: Path) -> bytes:
    try:
        return files.read_bounded(file)
    except (OSError, TableError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is too large"
        raise EngineError(f"cannot read {file}: {reason}; is SGLang installed whole?") from error


def _replace(file: Path, contents: bytes) -> None:
    """The old file or the new one lies there, whatever happens; other names of the old file (hard links) keep it."""
    temporary: str | None = None
    try:
        files.remove_leftovers(file.parent)
        temporary = files.stage(file, contents)
        os.chmod(temporary, stat.S_IMODE(file.stat().st_mode))
        os.replace(temporary, file)
        temporary = None
    except OSError as error:
        raise EngineError(
            f"cannot write {file}: {error.strerror}; run this as the owner of the engine's environment"
        ) from error
    finally:
        if temporary is not None:
            os.unlink(temporary)


GROUP = "sglang.srt.plugins"
"""The engine's group of entry points, and since 0.5.11 its module that calls them."""
ENTRY_POINT = "sglang_moe_ext"
STARTUP_FILE = "sglang_moe_ext_startup.pth"


@dataclass(frozen=True, slots=True)
class HookRoutes:
    """`startup_file`: the one that each process of this Python runs. `entry_point`: the engine calls ours."""

    startup_file: Path | None
    entry_point: bool

    @property
    def unreached(self) -> str | None:
        """The processes that run without us, or None."""
        if self.startup_file is not None:
            return None
        return "bench_one_batch, Ray's SchedulerActor and scripts" if self.entry_point else "all processes"


def find_routes(engine: SglangInstallation) -> HookRoutes:
    """What this Python and that engine have."""
    return HookRoutes(_startup_file(), calls_plugins(engine) and _is_entry_point_installed())


def calls_plugins(engine: SglangInstallation) -> bool:
    """Whether that release has the module that calls entry points."""
    return (engine.root.parent / GROUP.replace(".", "/") / "__init__.py").is_file()


def _is_entry_point_installed() -> bool:
    return any(point.name == ENTRY_POINT for point in importlib.metadata.entry_points(group=GROUP))


def _startup_file() -> Path | None:
    """Python reads .pth files in its site folders alone: in a folder of PYTHONPATH one is never run."""
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    return next((path for folder in folders if (path := Path(folder) / STARTUP_FILE).is_file()), None)
