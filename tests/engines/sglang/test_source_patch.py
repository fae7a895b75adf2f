"""Patches of the real layer modules: pure insertions, refused by any other file, taken out byte for byte."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.sglang import source_patch
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.engines.sglang.source_patch import SourcePatch
from tests.engines.installed import ENGINES_DIR, REPO_ROOT, engine_environment
from tools import make_patches

VERSIONS = ("0.5.5", "0.5.8", "0.5.10", "0.5.12", "0.5.15", "0.5.18", "0.5.20", "0.5.23")
every_release = pytest.mark.parametrize("version", VERSIONS)


def unpacked(version: str) -> SglangInstallation:
    return SglangInstallation(version, ENGINES_DIR / "sglang" / version / "sglang", triton=None)


def patch_of(version: str) -> SourcePatch:
    return source_patch.find(unpacked(version))


def original(version: str) -> bytes:
    return patch_of(version).file(unpacked(version)).read_bytes()


def laid_out(version: str, site: Path) -> SglangInstallation:
    """An engine that has only the file to patch."""
    engine = SglangInstallation(version, site / "sglang", triton=None)
    file = patch_of(version).file(engine)
    file.parent.mkdir(parents=True)
    file.write_bytes(original(version))
    return engine


@every_release
def test_the_patch_is_what_the_tool_makes_of_the_real_module(version: str) -> None:
    path = make_patches.PATCHES / version / source_patch.NAME
    assert path.read_text(encoding="utf-8") == make_patches.text(unpacked(version))


def test_each_release_that_is_held_has_a_patch() -> None:
    assert {path.parent.name for path in make_patches.PATCHES.glob("*/*.patch")} == set(VERSIONS)


@every_release
def test_the_patched_module_is_the_engines_with_our_lines_at_its_end(version: str, tmp_path: Path) -> None:
    engine, patch = laid_out(version, tmp_path), patch_of(version)
    assert source_patch.apply(patch, engine)
    assert patch.file(engine).read_bytes() == original(version) + make_patches.INSERTED.encode()
    assert source_patch.state(patch, engine) == "applied"
    compile(patch.file(engine).read_bytes(), "fused_moe.py", "exec")


@every_release
def test_taken_out_it_is_the_engines_file_byte_for_byte(version: str, tmp_path: Path) -> None:
    engine, patch = laid_out(version, tmp_path), patch_of(version)
    source_patch.apply(patch, engine)
    assert source_patch.revert(patch, engine)
    assert patch.file(engine).read_bytes() == original(version)


@every_release
@pytest.mark.parametrize("tool", [("git", "apply", "--unidiff-zero"), ("patch", "-p1", "-i")], ids=lambda tool: tool[0])
def test_the_common_tools_make_the_same_of_it(version: str, tool: tuple[str, ...], tmp_path: Path) -> None:
    if shutil.which(tool[0]) is None:
        pytest.skip(f"no {tool[0]} here")
    engine, patch = laid_out(version, tmp_path), patch_of(version)
    file = make_patches.PATCHES / version / source_patch.NAME
    subprocess.run([*tool, str(file)], cwd=tmp_path, check=True, capture_output=True)
    assert source_patch.state(patch, engine) == "applied"


def test_applied_twice_the_lines_are_in_once(tmp_path: Path) -> None:
    engine, patch = laid_out("0.5.15", tmp_path), patch_of("0.5.15")
    source_patch.apply(patch, engine)
    assert not source_patch.apply(patch, engine)
    assert source_patch.state(patch, engine) == "applied"


def test_what_is_not_in_is_not_taken_out(tmp_path: Path) -> None:
    engine, patch = laid_out("0.5.15", tmp_path), patch_of("0.5.15")
    assert not source_patch.revert(patch, engine)
    assert patch.file(engine).read_bytes() == original("0.5.15")


@given(
    version=st.sampled_from(VERSIONS),
    at=st.floats(0, 1),
    extra=st.binary(min_size=1, max_size=3),
    is_patched=st.booleans(),
)
def test_a_file_with_any_byte_more_is_refused_and_left_alone(
    tmp_path_factory: pytest.TempPathFactory, version: str, at: float, extra: bytes, is_patched: bool
) -> None:
    engine, patch = laid_out(version, tmp_path_factory.mktemp("site")), patch_of(version)
    if is_patched:
        source_patch.apply(patch, engine)
    file = patch.file(engine)
    contents = file.read_bytes()
    cut = int(at * len(contents))
    changed = contents[:cut] + extra + contents[cut:]
    file.write_bytes(changed)
    assert source_patch.state(patch, engine) == "unknown contents"
    for change in (source_patch.apply, source_patch.revert):
        with pytest.raises(EngineError, match=f"is not the file of SGLang {version}.*nothing changed; `pip install"):
            change(patch, engine)
    assert file.read_bytes() == changed
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_our_lines_at_another_place_are_not_taken_out(tmp_path: Path) -> None:
    engine, patch = laid_out("0.5.15", tmp_path), patch_of("0.5.15")
    patch.file(engine).write_bytes(patch.inserted + original("0.5.15"))
    with pytest.raises(EngineError, match="nothing changed"):
        source_patch.revert(patch, engine)


def test_a_hard_link_to_the_engines_file_keeps_what_it_had(tmp_path: Path) -> None:
    engine, patch = laid_out("0.5.15", tmp_path), patch_of("0.5.15")
    os.link(patch.file(engine), tmp_path / "cache")
    source_patch.apply(patch, engine)
    assert (tmp_path / "cache").read_bytes() == original("0.5.15")


def test_a_file_that_is_a_link_into_a_cache_leaves_the_cache_alone(tmp_path: Path) -> None:
    engine, patch = laid_out("0.5.15", tmp_path), patch_of("0.5.15")
    file = patch.file(engine).rename(tmp_path / "cache")
    patch.file(engine).symlink_to(file)
    source_patch.apply(patch, engine)
    assert file.read_bytes() == original("0.5.15")
    assert source_patch.state(patch, engine) == "applied"


@pytest.mark.parametrize("mode", [0o644, 0o664, 0o600], ids=oct)
def test_the_file_keeps_its_mode(mode: int, tmp_path: Path) -> None:
    engine, patch = laid_out("0.5.15", tmp_path), patch_of("0.5.15")
    patch.file(engine).chmod(mode)
    source_patch.apply(patch, engine)
    assert patch.file(engine).stat().st_mode & 0o7777 == mode


@pytest.mark.parametrize("step", ["tempfile.mkstemp", "os.fsync", "os.replace"])
def test_a_disk_that_refuses_changes_nothing_and_costs_one_line(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system")

    engine, patch = laid_out("0.5.15", tmp_path), patch_of("0.5.15")
    monkeypatch.setattr(step, refuse)
    with pytest.raises(EngineError, match=r"cannot write .*fused_moe.py: Read-only file system; run this as") as error:
        source_patch.apply(patch, engine)
    assert "\n" not in str(error.value)
    assert patch.file(engine).read_bytes() == original("0.5.15")
    assert len(list(patch.file(engine).parent.iterdir())) == 1


_DIES_IN = (
    "import os, sys; from pathlib import Path; from sglang_moe_ext.engines.sglang import source_patch; "
    "from sglang_moe_ext.engines.sglang.installation import SglangInstallation; "
    "module, _, name = sys.argv[2].rpartition('.'); real = getattr(sys.modules[module], name); "
    "die = lambda *a, **k: (real(*a, **k) if sys.argv[3] == 'after' else 0, os._exit(9)); "
    "setattr(sys.modules[module], name, die); "
    "engine = SglangInstallation('0.5.15', Path(sys.argv[1]), None); "
    "source_patch.apply(source_patch.find(engine), engine)"
)


@pytest.mark.parametrize(
    ("step", "when", "left"),
    [
        ("os.fsync", "before", "not applied"),
        ("os.replace", "before", "not applied"),
        ("os.replace", "after", "applied"),
    ],
)
def test_a_crash_leaves_the_old_file_or_the_new_one(step: str, when: str, left: str, tmp_path: Path) -> None:
    engine, patch = laid_out("0.5.15", tmp_path), patch_of("0.5.15")
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run([sys.executable, "-c", _DIES_IN, str(engine.root), step, when], env=environment, check=False)
    assert done.returncode == 9
    assert source_patch.state(patch, engine) == left


def test_a_release_without_a_patch_is_told_which_have_one() -> None:
    with pytest.raises(EngineError, match=r"no patch for SGLang 0\.5\.9 .*0\.5\.8, 0\.5\.10, 0\.5\.12"):
        source_patch.find(SglangInstallation("0.5.9", Path("/nowhere"), None))


def test_an_engine_without_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot read .*fused_moe\.py: No such file or directory"):
        source_patch.state(patch_of("0.5.15"), SglangInstallation("0.5.15", tmp_path, None))


@given(st.binary(max_size=400), st.integers(0, 900), st.integers(0, 40))
def test_a_patch_file_that_is_damaged_is_one_error(rest: bytes, at: int, dropped: int) -> None:
    text = (make_patches.PATCHES / "0.5.15" / source_patch.NAME).read_bytes()
    damaged = text[:at] + rest + text[at + dropped :]
    try:
        parsed = source_patch.parse("0.5.15", damaged)
    except EngineError as error:
        assert "damaged" in str(error)
    else:
        assert not parsed.target.startswith("/") and ".." not in parsed.target


_IMPORTS_THE_LAYER = """
import sys
from sglang_moe_ext.engines.sglang import bootstrap
from sglang_moe_ext.serving import attach, plugin
if sys.argv[2] == "gone": del plugin.attach_patched
bootstrap.import_engine(sys.argv[1])
print(attach.state().is_active, attach.state().why)
"""


@pytest.mark.usefixtures("forked_engines")
@pytest.mark.parametrize(
    ("ours", "state"), [("ours", "True a patch"), ("gone", "False the engine's layer has not been imported")]
)
@pytest.mark.parametrize("version", ["0.5.10", "0.5.23"])
def test_the_patched_engine_is_hooked_and_starts_without_us(
    version: str, ours: str, state: str, tmp_path: Path
) -> None:
    subprocess.run(["cp", "-al", ENGINES_DIR / "sglang" / version, tmp_path / "site"], check=True)
    engine = SglangInstallation(version, tmp_path / "site" / "sglang", None)
    source_patch.apply(patch_of(version), engine)
    assert source_patch.state(patch_of(version), unpacked(version)) == "not applied"
    environment = engine_environment(version)
    environment["PYTHONPATH"] = os.pathsep.join((str(REPO_ROOT), str(tmp_path / "site")))
    command = [sys.executable, "-W", "ignore", "-c", _IMPORTS_THE_LAYER, engine.layer_module, ours]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == state
