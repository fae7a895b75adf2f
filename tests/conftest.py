"""What all tests share: how hypothesis draws examples, and which tests start an engine.

`./check` draws the same examples each time, so that a fresh clone never fails by chance; `./check --fuzz` draws others.
"""

import gc
import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.engines.fork_server import SESSION
from tests.engines.installed import forked_python
from tests.examples import examples

gc.disable()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other: more threads wait for cores, and spin
settings.register_profile("check", deadline=None, derandomize=True, database=None)
settings.register_profile("fuzz", deadline=None, max_examples=examples(100), print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "check"))

STARTERS = (
    "tests.engines.installed",
    "offline_down",
    "warp_specialized_offline",
    "sglang_moe_ext.kernels.fused_moe_compile",
    "sglang_moe_ext.tuning.bench.worker",
    "sglang_moe_ext.tuning.compile.pool",
    "sglang_moe_ext.tuning.run.ray_executor",
)
"""Modules whose functions and classes start an engine, a compiler, or processes that measure or compile."""
SLOW = (
    "tests/servers/",
    "tests/kernels/test_in_interpreter.py",
    "tests/kernels/test_quick_interpreter.py",
    "tests/models/test_every_transformers_class.py",
)
"""Tests that start a server, an interpreter or another Python by other means."""


@pytest.fixture(autouse=True, scope="session")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One folder for all processes of this session: no binary is compiled twice, and none is an earlier run's."""
    own = tmp_path_factory.getbasetemp()
    session = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SESSION, str(session))
        patch.setenv("TRITON_CACHE_DIR", str(session / "triton"))
        yield


@pytest.fixture
def forked_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes in which this package asks an engine, or compiles its kernel, are forked: 5 s of imports are saved.

    That they run where Python starts afresh is tested in tests/cli/test_doctor_url.py and tests/tuning, without this.
    """
    monkeypatch.setattr(sys, "executable", forked_python())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `./check --quick` leaves out, and run it first, so that no worker begins a long file at the end.

    Marked is each test of a module that has something of STARTERS or the folder of the engines, and the slow ones.
    """
    for item in items:
        module = vars(getattr(item, "module", None) or object)
        starts = any(getattr(value, "__module__", "") in STARTERS for value in module.values())
        if starts or "ENGINES_DIR" in module or item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.engine)
    items.sort(key=lambda item: (not item.nodeid.startswith(SLOW), item.get_closest_marker("engine") is None))


def pytest_collection_finish() -> None:
    """What was collected lives to the end: the collector of garbage need not look at it while it grows, nor later."""
    gc.freeze()
    gc.enable()
