"""The flags that say how to measure: upstream's keep names and meaning, and nonsense is refused by its name."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from sglang_moe_ext.cli import measure_args, tune
from sglang_moe_ext.core import MoEExtError

GLM = ("--model", "GLM-4.7-Flash")
UPSTREAM = (
    *("--model", "Qwen/Qwen3-30B-A3B", "--tp", "4", "--ep", "2", "--dtype", "fp8_w8a8", "--per-channel-quant"),
    *("--batch-size", "64", "--seed", "7", "--disable-shared-experts-fusion", "--topk-ids-dir", "dumps", "--tune"),
    *("--configs", "64", "128", "64", "16", "4", "3", "--cmp-configs", "a.json", "b.json"),
)


def parsed(*flags: str) -> argparse.Namespace:
    return tune.parser().parse_args(flags)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "Qwen/Qwen3-30B-A3B"),
        ("tp_size", 4),
        ("ep_size", 2),
        ("dtype", "fp8_w8a8"),
        ("per_channel_quant", True),
        ("batch_size", [64]),
        ("seed", 7),
        ("disable_shared_experts_fusion", True),
        ("topk_ids_dir", Path("dumps")),
        ("configs", [64, 128, 64, 16, 4, 3]),
        ("cmp_configs", [Path("a.json"), Path("b.json")]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_command_line_of_upstreams_means_the_same_here(name: str, value: object) -> None:
    assert getattr(parsed(*UPSTREAM), name) == value


@pytest.mark.parametrize(("short", "long"), [("--tp", "--tp-size"), ("--ep", "--ep-size")])
def test_both_spellings_of_upstreams_sizes_are_one_flag(short: str, long: str) -> None:
    assert parsed(*GLM, short, "8") == parsed(*GLM, long, "8")


def test_upstreams_tune_changes_nothing() -> None:
    without, with_it = vars(parsed(*GLM)), vars(parsed(*GLM, "--tune"))
    assert {name for name in without if without[name] != with_it[name]} == {"tune"}


def test_upstreams_tune_is_not_in_the_help() -> None:
    assert "--tune" not in tune.parser().format_help()


def test_the_flags_make_sense_as_they_are_by_default() -> None:
    measure_args.check(parsed(*GLM))


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (("--budget", "0"), "--budget 0"),
        (("--budget", "-5"), "--budget -5"),
        (("--budget", "nan"), "--budget nan"),
        (("--budget", "inf"), "--budget inf"),
        (("--deadline", "0"), "--deadline 0"),
        (("--seed", "-1"), "--seed -1"),
        (("--seed", str(2**64)), f"--seed {2**64}"),
        (("--gpus", "0", "--ray"), "--gpus and --ray"),
        (("--topk-ids-dir", "x", "--routing", "zipf"), "--routing and --topk-ids-dir"),
        (("--predict", "--resume"), "--resume is about measuring"),
        (("--predict", "--gpus", "all"), "--gpus is about measuring"),
        (("--predict", "--ray"), "--ray is about measuring"),
        (("--predict", "--budget", "10"), "--budget is about measuring"),
        (("--predict", "--deadline", "10"), "--deadline is about measuring"),
        (("--predict", "--effort", "quick"), "--effort is about measuring"),
        (("--predict", "--routing", "zipf"), "--routing is about measuring"),
        (("--predict", "--topk-ids-dir", "x"), "--topk-ids-dir is about measuring"),
        (("--predict", "--configs", "64"), "--configs is about measuring"),
        (("--predict", "--cmp-configs", "a.json"), "--cmp-configs is about measuring"),
        (("--configs", "64", "--dry-run"), "--dry-run is about tuning, and --configs"),
        (("--configs", "64", "--resume"), "--resume is about tuning"),
        (("--configs", "64", "--resume", "folder"), "--resume is about tuning"),
        (("--cmp-configs", "a.json", "--budget", "10"), "--budget is about tuning, and --cmp-configs"),
        (("--configs", "64", "--output-dir", "x"), "--output-dir is about tuning"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_makes_no_sense_on_any_gpu_is_refused_by_its_name(flags: tuple[str, ...], culprit: str) -> None:
    with pytest.raises(MoEExtError, match=culprit):
        measure_args.check(parsed(*GLM, *flags))


@pytest.mark.parametrize(
    "flags",
    [
        ("--effort", "heroic"),
        ("--routing", "elliptic"),
        ("--budget", "soon"),
        ("--deadline", "soon"),
        ("--seed", "x"),
        ("--configs", "64", "wide"),
        ("--configs",),
        ("--cmp-configs",),
    ],
    ids=" ".join,
)
def test_a_word_that_is_no_value_is_a_usage_error(flags: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parsed(*GLM, *flags)
    assert stopped.value.code == 2
