"""Servers of the real SGLang, in an environment that our wheel was installed into as a user installs it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.fork_server import ForkServer, session_folder
from tests.engines.installed import REPO_ROOT
from tests.servers import server as servers
from tests.servers import tiny_model
from tests.servers.server import Site

TEST_PLUGIN = Path(__file__).parent / "moe_on_cpu"


@pytest.fixture(scope="session")
def site() -> Site:
    """An environment laid over the one of the tests, which has torch, Triton and transformers, and a tiny model.

    The first worker that wants it makes it, for all.
    """
    with session_folder("servers") as folder:
        python, model = folder / "venv" / "bin" / "python", folder / "model"
        if not model.exists():
            _make(folder, python)
            tiny_model.save(model)
    return Site(python, model, folder)


def _make(folder: Path, python: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (own,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (own / "beside_the_engine.pth").write_text(sysconfig.get_path("purelib"))
    for project in (REPO_ROOT, TEST_PLUGIN):
        quietly = ("--quiet", "--disable-pip-version-check", "--no-build-isolation", "--no-deps")
        subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *quietly, str(project)], check=True)


@pytest.fixture(scope="session")
def forked_site(site: Site) -> Iterator[Site]:
    """The same, whose servers are forked from a Python that has imported what every engine imports, and ran our .pth.

    A server starts three processes, each of which imports for 5 s.
    """
    fork_server = ForkServer.of_session("site", servers.environment(site, None), site.python)
    yield dataclasses.replace(site, python=fork_server.python)
    fork_server.close()
