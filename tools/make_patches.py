"""Make the patches of each unpacked SGLang: patches/sglang/<version>/, pure insertions with no line of the engine's.

usage: python -m tools.make_patches [--check]      (from the project's folder; --check only compares)
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from sglang_moe_ext.engines.sglang import source_patch
from sglang_moe_ext.engines.sglang.installation import SglangInstallation

ROOT = Path(__file__).resolve().parents[1]
ENGINES = Path(os.environ.get("SGLANG_MOE_EXT_ENGINES", ROOT / ".engines")) / "sglang"
PATCHES = ROOT / "patches" / "sglang"

INSERTED = """\


try:  # inserted by sglang-moe-ext; `sglang-moe-ext patch --revert` takes these lines out
    from sglang_moe_ext.serving.plugin import attach_patched
except ImportError:
    pass
else:
    attach_patched()
"""


def text(engine: SglangInstallation) -> str:
    """The patch that inserts the lines at the end of that engine's layer module."""
    target = engine.layer_module.replace(".", "/") + ".py"
    before = (engine.root.parent / target).read_bytes()
    if not before.endswith(b"\n"):
        sys.exit(f"{target} of SGLang {engine.version_text} has no newline at its end: lines cannot just follow")
    last, count = before.count(b"\n"), INSERTED.count("\n")
    digests = [hashlib.sha256(contents).hexdigest() for contents in (before, before + INSERTED.encode())]
    head = (
        f"Call the hooks of sglang-moe-ext where the layer module of SGLang {engine.version_text} ends.\n"
        "Made by tools/make_patches.py. SHA-256 of the file:\n\n"
        f"before: {digests[0]}\nafter: {digests[1]}\n\n"
        f"--- a/{target}\n+++ b/{target}\n@@ -{last},0 +{last + 1},{count} @@\n"
    )
    return head + "".join(f"+{line}\n" for line in INSERTED.splitlines())


def made() -> dict[Path, str]:
    """All patches, by file."""
    roots = [folder / "sglang" for folder in sorted(ENGINES.iterdir())]
    engines = [SglangInstallation(root.parent.name, root, triton=None) for root in roots]
    return {PATCHES / engine.version_text / source_patch.NAME: text(engine) for engine in engines}


def main() -> None:
    patches = made()
    lying = {path: path.read_text(encoding="utf-8") for path in PATCHES.glob("*/*.patch")}
    if lying == patches:
        return
    if "--check" in sys.argv:
        stale = sorted(
            str(path.relative_to(ROOT)) for path in patches.keys() | lying if lying.get(path) != patches.get(path)
        )
        sys.exit(f"not what tools/make_patches.py makes: {', '.join(stale)}")
    for path, patch in patches.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(patch, encoding="utf-8")


if __name__ == "__main__":
    main()
