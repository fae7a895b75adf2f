"""Which processes a probe may fork: their forks must be able to use CUDA."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from sglang_moe_ext.engines import probe_server


@pytest.mark.parametrize(
    ("initialized", "bad_forks", "expected"),
    [(False, False, True), (True, False, False), (False, True, False)],
    ids=["untouched", "initialized", "devices counted"],
)
def test_forks_can_use_cuda_where_it_was_not_touched(
    initialized: bool, bad_forks: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(is_initialized=lambda: initialized, _is_in_bad_fork=lambda: bad_forks)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert probe_server._forks_can_use_cuda() is expected


def test_forks_can_use_cuda_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert probe_server._forks_can_use_cuda()


def test_torch_says_of_a_fork_whether_it_is_bad() -> None:
    import torch

    assert torch.cuda._is_in_bad_fork() is False
