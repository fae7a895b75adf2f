"""Remember what an engine answered, as long as nothing that it read its answer from has changed.

An engine takes ten seconds and more to start. The key of an answer covers the installation, the question, the variables
that decide on tables, and the name, size and time of each file in the folders that the engine reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang_moe_ext import __version__, env, package_data
from sglang_moe_ext.core import TileConfig
from sglang_moe_ext.engines.backend_answer import AskedBackend
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult, request_of
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.engines.vllm.installation import VllmInstallation
from sglang_moe_ext.tables import user_store

_FOLDER = "answers"
_MOST_ANSWERS = 200
_VARIABLES = (
    env.SGLANG_CONFIG_DIR,
    env.VLLM_CONFIG_FOLDER,
    env.SGLANG_PLUGINS,
    env.VLLM_PLUGINS,
    env.STORE,
    env.DISABLE,
    env.KERNELS,
    "CUDA_VISIBLE_DEVICES",
    "PYTHONPATH",
    "VLLM_BATCH_INVARIANT",
)


def folder() -> Path:
    """`answers` in the user's cache folder. Raises RuntimeError where the user has no home."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "sglang_moe_ext" / _FOLDER


def key_of(engine: object, question: LookupRequest, device_name: str) -> str:
    """What an answer depends on, as one name of a file."""
    stated = {
        "release": __version__,
        "python": sys.executable,
        "engine": repr(engine),
        "question": request_of(question),
        "device": device_name,
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
        "files": [[str(path), *_state(path)] for root in _roots(engine) for path in _files(root)],
    }
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:32]


def _roots(engine: object) -> list[Path]:
    """Each folder from which the engine reads tables, and its modules of the lookup."""
    named = [Path(folder) for name in _VARIABLES[:2] if (folder := os.environ.get(name))]
    named += _roots_of_our_hooks()
    match engine:
        case SglangInstallation():
            return [engine.configs_root.parent, *named]
        case VllmInstallation():
            return [engine.configs_folder.parent, *named]
        case _:
            return named


def _roots_of_our_hooks() -> list[Path]:
    """The engine is asked with our hooks in, which read the user's own tables and the shipped ones."""
    own, shipped = user_store.root_if_any(), package_data.folder("tuned_configs")
    found = [] if own is None else [own / "tables" / engine for engine in ("sglang", "vllm")]
    return found + ([] if shipped is None else [shipped / "configs", shipped / "vllm"])


def _files(root: Path) -> Iterator[Path]:
    """Tables and modules, down to the folder of a Triton; an added or removed file changes the list itself."""
    for pattern in ("*.py", "*.json", "configs/*.json", "configs/*/*.json", "triton_*/*.json"):
        yield from sorted(root.glob(pattern))


def _state(path: Path) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return 0, 0


def recall(key: str) -> LookupResult | None:
    """The answer to that key, None where there is none that can be read."""
    try:
        return _parse(json.loads((folder() / f"{key}.json").read_text(encoding="utf-8")))
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _parse(stated: Mapping[str, Any]) -> LookupResult:
    return LookupResult(
        engine_version=stated["engine_version"],
        triton=stated["triton"],
        device_name=stated["device_name"],
        up={int(m): TileConfig(**config) for m, config in stated["up"].items()},
        down={int(m): None if config is None else TileConfig(**config) for m, config in stated["down"].items()},
        files=tuple(Path(file) for file in stated["files"]),
        log=tuple(stated["log"]),
        plugin=stated["plugin"],
        whys={int(m): why for m, why in stated["whys"].items()},
        paths={int(m): path for m, path in stated["paths"].items()},
        written={int(m): by for m, by in stated["written"].items()},
        fitted={int(m): by for m, by in stated["fitted"].items()},
        alone={int(m): entry for m, entry in stated["alone"].items()},
        alone_errors={int(m): error for m, error in stated["alone_errors"].items()},
        remarks=tuple(stated["remarks"]),
        backend=None if stated["backend"] is None else AskedBackend(**stated["backend"]),
    )


def remember(key: str, answer: LookupResult) -> None:
    """Keep the answer, and no more than a few hundred. A cache that cannot be written costs nothing but time."""
    with contextlib.suppress(OSError, RuntimeError):
        place = folder()
        place.mkdir(parents=True, exist_ok=True)
        unfinished = place / f".{key}.{os.getpid()}.tmp"
        unfinished.write_text(json.dumps(asdict(answer), default=str), encoding="utf-8")
        os.replace(unfinished, place / f"{key}.json")
        oldest_first = sorted(place.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in oldest_first[:-_MOST_ANSWERS]:
            path.unlink(missing_ok=True)
