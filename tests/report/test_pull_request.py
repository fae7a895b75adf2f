"""The text of a pull request: the form of each project, a gain for each M, and nothing of a stranger's that acts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from sglang_moe_ext.report import pull_request, table_data
from tests.report.sources import (
    GLM,
    GLM_H200,
    GLM_VLLM,
    HOSTILE,
    QWEN,
    REPO_ROOT,
    changed_provenance,
    copied,
    of_journal,
    of_table,
)


def headings(text: str) -> list[str]:
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


def test_each_project_gets_its_own_form() -> None:
    sglang, vllm = (pull_request.write(of_table(table)) for table in (GLM_H200, GLM_VLLM))
    assert headings(sglang) == ["Motivation", "Modifications", "Accuracy Tests", "Benchmarking and Profiling"]
    assert headings(vllm) == ["Purpose", "Changes", "Test Plan", "Test Result"]
    assert sglang.startswith("# Add fused MoE Triton configs for GLM-4.7-Flash on NVIDIA H200\n")
    assert vllm.startswith("# [Kernel] Add fused MoE configs for GLM-4.7-Flash on NVIDIA H200\n")


def test_files_go_where_the_installed_engine_has_its_own() -> None:
    sglang = (REPO_ROOT / ".engines/sglang/0.5.23/sglang").glob("srt/layers/moe/moe_runner/triton_utils/configs/*")
    vllm = REPO_ROOT / ".engines/vllm/0.33.0/vllm/model_executor/layers/fused_moe/configs"
    assert any(folder.name.startswith("triton_") for folder in sglang) and vllm.is_dir()
    written = pull_request.write(of_table(GLM_H200))
    folder = "python/sglang/srt/layers/moe/moe_runner/triton_utils/configs/triton_3_6_0"
    assert f"- `{folder}/{GLM_H200.name}`\n- `{folder}/{GLM_H200.stem}_down.json`" in written
    assert f"- `vllm/model_executor/layers/fused_moe/configs/{GLM_VLLM.name}`" in pull_request.write(of_table(GLM_VLLM))


def test_every_number_of_tokens_has_its_gain() -> None:
    run = of_table(GLM_H200)
    lines = [line for line in pull_request.table(run).splitlines() if line.startswith("| ")]
    assert lines[0] == "| M | before, us | after, us | gain | 95 % | relative error |"
    assert re.fullmatch(r"\| 1 \| \d+\.\d \| \d+\.\d \| \d\.\d\dx \| \d\.\d\d to \d\.\d\d \| \d\.\de-03 \|", lines[2])
    assert f"| {run.rows[0].stock_us:.1f} | {run.rows[0].tuned_us:.1f} |" in lines[2]
    assert len(lines) == 2 + len(run.rows)
    assert {line.count("|") for line in lines} == {7}


def test_a_journal_says_that_its_command_is_not_recorded() -> None:
    written = pull_request.write(of_journal(QWEN))
    assert "    # not recorded" in written and "date: not recorded" in written


def test_a_run_that_changed_nothing_says_that_there_is_nothing_to_send() -> None:
    assert "Nothing beat what SGLang ran there before: there is nothing to send." in pull_request.write(of_journal(GLM))


def test_entries_that_were_not_measured_are_called_so() -> None:
    run = of_table(GLM_H200)
    rows = (replace(run.rows[0], origin="predicted"), *run.rows[1:])
    assert "1 of 20 entries were NOT measured" in pull_request.write(replace(run, rows=rows))
    assert "NOT measured" not in pull_request.write(run)


def test_an_unknown_engine_gets_no_form() -> None:
    assert "does not say which engine" in pull_request.write(replace(of_table(GLM_H200), engine=None))


def test_a_strangers_text_does_nothing_in_markdown(tmp_path: Path) -> None:
    table = copied(GLM_H200, tmp_path)
    changed_provenance(table, model=HOSTILE, command="run `x` <b>\n# heading", kernel=HOSTILE)
    written = pull_request.write(table_data.read(table))
    prose = [line for line in written.splitlines() if not line.startswith("    ")]
    assert not any("<script" in line and "\\<script" not in line for line in prose)
    assert not any("](" in line and "\\](" not in line for line in prose)
    assert "@someone" not in written and "https://example" not in written
    assert "    run 'x' <b>\\n# heading" in written
