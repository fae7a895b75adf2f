"""How each engine's project takes tables: its repository's folder, the headings of its pull requests."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_moe_ext.engines.adapter import EngineName


@dataclass(frozen=True, slots=True)
class PullRequestForm:
    """`folder`: of tables in its repository, with {triton}; headings as its template has them."""

    folder: str
    title: str
    motivation: str
    changes: str
    accuracy: str
    benchmark: str


FORMS: dict[EngineName, PullRequestForm] = {
    "sglang": PullRequestForm(
        folder="python/sglang/srt/layers/moe/moe_runner/triton_utils/configs/triton_{triton}",
        title="Add fused MoE Triton configs for {model} on {gpu}",
        motivation="Motivation",
        changes="Modifications",
        accuracy="Accuracy Tests",
        benchmark="Benchmarking and Profiling",
    ),
    "vllm": PullRequestForm(
        folder="vllm/model_executor/layers/fused_moe/configs",
        title="[Kernel] Add fused MoE configs for {model} on {gpu}",
        motivation="Purpose",
        changes="Changes",
        accuracy="Test Plan",
        benchmark="Test Result",
    ),
}
"""Templates of both repositories as of 2026-11; a form for people, which they may change before they send it."""
