"""Shipped folders are found in a wheel and in a checkout, and nobody else's is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_moe_ext import package_data


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "sglang_moe_ext").mkdir()
    return tmp_path / "sglang_moe_ext"


def test_a_wheel_has_the_folder_inside_the_package(package: Path) -> None:
    (package / "_patches").mkdir()
    assert package_data.folder("patches", package) == package / "_patches"


def test_a_checkout_has_the_folder_beside_the_package(package: Path, tmp_path: Path) -> None:
    (tmp_path / "patches").mkdir()
    (tmp_path / "pyproject.toml").touch()
    assert package_data.folder("patches", package) == tmp_path / "patches"


def test_a_neighbour_of_that_name_in_site_packages_is_not_ours(package: Path, tmp_path: Path) -> None:
    (tmp_path / "patches").mkdir()
    assert package_data.folder("patches", package) is None


@pytest.mark.parametrize("name", ["patches", "tuned_configs"])
def test_this_package_has_it(name: str) -> None:
    found = package_data.folder(name)
    assert found is not None and any(found.iterdir())
