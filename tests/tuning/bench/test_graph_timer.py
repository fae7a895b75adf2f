"""What a layer adds to a graph of flushes, of times as a GPU gave them."""

from __future__ import annotations

import pytest

from sglang_moe_ext.tuning.bench.graph_timer import without_flushes


def test_a_layer_is_what_it_adds_to_the_flushes_of_a_graph() -> None:
    assert without_flushes([[100.0, 140.0, 180.0], [104.0, 144.0, 184.0], [100.0, 144.0, 180.0]], 4) == [
        [10.0, 20.0],
        [11.0, 21.0],
        [11.0, 20.0],
    ]


def test_a_layer_that_takes_no_time_is_an_error_and_no_time() -> None:
    """As on an H200 on which three tuners ran at once: -8.3 us for a layer of GLM-4.7-Flash (2026-11-27)."""
    with pytest.raises(RuntimeError, match="another process uses this GPU"):
        without_flushes([[133.0, 800.0, 99.8], [133.0, 810.0, 900.0]], 4)
