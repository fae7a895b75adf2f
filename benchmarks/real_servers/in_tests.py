"""In the process of an engine's own tests: the plugin as installed, and what was run by it; a plugin of pytest.

`sitecustomize` in the folder that `engine_tests` puts first on PYTHONPATH calls `begin`, in the children of tests as
well. What is seen is appended to files, since a child may end in any way.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import site
import time
import types
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sglang_moe_ext.import_hook as hook

OUT, SHARE, SECONDS = "REAL_SERVERS_TESTS", "REAL_SERVERS_SHARE", "REAL_SERVERS_TEST_SECONDS"
"""The folder that gets the files; the share of the tests that is run; for how long."""
RESULTS, LINES, PLANS = "results.jsonl", "lines.txt", "plans.txt"
LATE = "no time was left"
_PACKAGING = Path(__file__).parents[2] / "packaging"
_LAST_KERNELS = {
    "sglang_moe_ext.kernels.gather_sum": "launch_gather_sum",
    "sglang_moe_ext.kernels.few_tokens": "few_tokens_layer",
}
"""Each plan of ours ends with one of them."""
_begun = time.monotonic()


class Kept(logging.Handler):
    """Appends what our package logs to a file."""

    def emit(self, record: logging.LogRecord) -> None:
        _append(LINES, record.getMessage())


def begin() -> None:
    """Run the startup file of an installation, and watch our kernels and our log."""
    for module, function in _LAST_KERNELS.items():
        hook.on_import(module, functools.partial(_count, function=function))
    ours = logging.getLogger("sglang_moe_ext")
    ours.setLevel(logging.INFO)
    ours.addHandler(Kept(logging.INFO))
    site.addsitedir(str(_PACKAGING))


def _count(module: Any, function: str) -> None:
    launch: Callable[..., Any] = getattr(module, function)

    @functools.wraps(launch)
    def counted(*args: Any, **kwargs: Any) -> Any:
        _append(PLANS, function)
        return launch(*args, **kwargs)

    setattr(module, function, counted)


def _append(name: str, line: str) -> None:
    with open(Path(os.environ[OUT]) / name, "a", encoding="utf-8") as file:
        file.write(line.replace("\n", " ") + "\n")


def is_drawn(name: str, share: float) -> bool:
    """Whether a test is of the share that is run: the same ones each time."""
    return zlib.crc32(name.encode()) / 2**32 < share


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    share = float(os.environ.get(SHARE, "1"))
    left_out = [item for item in items if not is_drawn(item.nodeid, share)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if is_drawn(item.nodeid, share)]


def pytest_runtest_setup(item: Any) -> None:
    import pytest

    if time.monotonic() - _begun > float(os.environ.get(SECONDS, "inf")):
        pytest.skip(LATE)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or not report.passed:
        said = report.longrepr if isinstance(report.longrepr, tuple) else str(report.longrepr or "").splitlines()[-1:]
        context = getattr(report, "context", None)  # of a subtest
        name = report.nodeid if context is None else f"{report.nodeid} {dict(context.kwargs)}"
        line = {"test": name, "outcome": report.outcome, "when": report.when, "why": str(said[-1:])[:300]}
        _append(RESULTS, json.dumps(line))


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        said = str(report.longrepr).splitlines()[-1:]
        line = {"test": report.nodeid, "outcome": "failed", "when": "collect", "why": str(said)[:300]}
        _append(RESULTS, json.dumps(line))


def _workspace() -> Iterator[None]:
    """What vLLM's tests/conftest.py, which needs far more than these tests, has for tests of layers."""
    import torch
    from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

    if torch.cuda.is_available():
        init_workspace_manager(torch.device("cuda", torch.cuda.current_device()))
    yield
    reset_workspace_manager()


def pytest_configure(config: Any) -> None:
    import pytest

    fixtures = types.ModuleType("fixtures_of_engine_tests")
    vars(fixtures)["workspace_init"] = pytest.fixture(_workspace)
    config.pluginmanager.register(fixtures)


def read(folder: Path) -> tuple[list[dict[str, str]], Sequence[str], int]:
    """Results of the tests, lines of our log, and how often a plan of ours ran."""

    def lines(name: str) -> list[str]:
        path = folder / name
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    return [json.loads(line) for line in lines(RESULTS)], list(dict.fromkeys(lines(LINES))), len(lines(PLANS))
