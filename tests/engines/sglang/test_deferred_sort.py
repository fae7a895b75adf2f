"""A sort that is put off: run once, where it is asked for, and by the thread that decided so alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from sglang_moe_ext.engines.sglang.deferred_sort import DeferredSort, NextSort, sort_now


def test_what_stands_for_the_results_becomes_them_by_one_sort() -> None:
    sorts: list[str] = []

    def sort() -> tuple[str, ...]:
        sorts.append("sort")
        return "ids", "experts", "padded"

    ids, experts, padded = DeferredSort(sort).parts()
    assert sorts == []
    assert sort_now(("hidden", ids, experts), {"padded": padded, "rest": 1}) == (
        ("hidden", "ids", "experts"),
        {"padded": "padded", "rest": 1},
    )
    assert sorts == ["sort"]


def test_a_decision_is_for_the_next_sort_alone() -> None:
    next_sort = NextSort()
    assert not next_sort.take()
    next_sort.decide(is_deferred=False)
    assert not next_sort.was_put_off
    next_sort.decide(is_deferred=True)
    assert next_sort.was_put_off
    assert (next_sort.take(), next_sort.take()) == (True, False)
    next_sort.decide(is_deferred=True)
    next_sort.decide(is_deferred=False)
    assert not next_sort.take()


def test_another_thread_sorts_as_it_decided_itself() -> None:
    next_sort = NextSort()
    next_sort.decide(is_deferred=True)
    with ThreadPoolExecutor(1) as other:
        assert not other.submit(next_sort.take).result()
    assert next_sort.take()
