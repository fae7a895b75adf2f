"""Servers of the real SGLang, in an environment that our wheel was installed into as a user installs it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.engines.installed import REPO_ROOT
from tests.servers import tiny_model
from tests.servers.server import Site

TEST_PLUGIN = Path(__file__).parent / "moe_on_cpu"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """An environment laid over the one of the tests, which has torch, Triton and transformers, and a tiny model."""
    folder = tmp_path_factory.mktemp("servers")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    (own,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (own / "beside_the_engine.pth").write_text(sysconfig.get_path("purelib"))
    for project in (REPO_ROOT, TEST_PLUGIN):
        quietly = ("--quiet", "--disable-pip-version-check", "--no-build-isolation", "--no-deps")
        subprocess.run([python, "-m", "pip", "install", *quietly, str(project)], check=True)
    tiny_model.save(folder / "model")
    return Site(python, folder / "model", folder)
