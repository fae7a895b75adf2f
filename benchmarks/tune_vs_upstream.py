"""Race our tuning command against upstream's on one layer, batch size and GPU: the time of each, and what it chose.

usage, from the repository root: python -m benchmarks.tune_vs_upstream --upstream FOLDER --model NAME_OR_FOLDER
       --batch-size M [--tp-size N] [--every N] [--seconds S] [--ray-stand-in]

FOLDER is benchmark/kernels/fused_moe_triton of SGLang's sources; its tuning_fused_moe_triton.py is run unmodified. Both
commands start with empty caches, and need no network where the model is built in or a folder. With --every or --seconds
upstream's time is extrapolated, and the output says so. The race is of whole layers, with cold caches and uniform
routings, which are what upstream's script tunes with.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import racing
from benchmarks.racing import Outcome, Track
from benchmarks.vs_upstream import effort, model_folder, ours, report, theirs
from benchmarks.vs_upstream.effort import Effort
from benchmarks.vs_upstream.theirs import Asked, Task, Upstream
from sglang_moe_ext.core import Gpu, MoEExtError, Table
from sglang_moe_ext.tuning.bench import routing
from sglang_moe_ext.tuning.bench.messages import Pair
from sglang_moe_ext.tuning.config_args import pairs_of_tables

ROUNDS = 96


def _fresh(folder: Path) -> dict[str, str]:
    """The environment of a command that is run for the first time: nothing compiled, no tables of the user's."""
    return {
        **os.environ,
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "SGLANG_MOE_EXT_STORE": str(folder / "store"),
    }


def _model(named: str, scratch: Path) -> str:
    """What both commands take as --model: a built-in one as a folder."""
    if Path(named).is_dir():
        return str(Path(named).absolute())
    builtin = model_folder.named(named)
    return named if builtin is None else str(model_folder.write(builtin, scratch / "model"))


def _task(arguments: argparse.Namespace, flags: Sequence[str], model: str) -> Task:
    return Task(
        model=Path(model),
        tp=arguments.tp_size,
        ep=arguments.ep_size,
        is_unfused=arguments.disable_shared_experts_fusion,
        shape=ours.shape_of(flags),
        tokens=arguments.batch_size,
    )


@dataclass(frozen=True, slots=True)
class Theirs:
    """What upstream's script took, and its table, None where it was stopped before it wrote one."""

    effort: Effort
    table: Table | None


def _run_theirs(upstream: Upstream, task: Task, asked: Asked, arguments: argparse.Namespace, folder: Path) -> Theirs:
    folder.mkdir()
    takes_all = arguments.every == 1 and arguments.seconds is None
    configs = None if takes_all else effort.sample(asked.space, arguments.every)
    run = theirs.tuned(upstream, task, configs, folder, arguments.seconds)
    return Theirs(effort.of(run, len(asked.space)), theirs.table(folder))


def _raced(task: Task, gpu: Gpu, todays: Pair, table: Table | None, of_ours: Pair) -> Outcome:
    tokens = task.tokens
    of_theirs = {} if table is None else {report.UPSTREAMS: pairs_of_tables(table, None, [tokens])}
    choices = {"the engine's today": {tokens: todays}, **of_theirs, report.OURS: {tokens: of_ours}}
    return racing.raced(Track(task.shape, gpu, routing.UNIFORM), choices, ROUNDS)[tokens]


def run(arguments: argparse.Namespace, command: str, scratch: Path) -> None:
    """Compare the two; the last line printed is JSON.

    Raises:
        MoEExtError: something is missing, or one of the commands failed.
    """
    upstream = theirs.found(arguments.upstream, _fresh(scratch / "upstream"), ray_stand_in=arguments.ray_stand_in)
    place = report.here(command)
    model = _model(arguments.model, scratch)
    flags = ours.flags_of(arguments, model)
    task = _task(arguments, flags, model)
    asked = theirs.ask(upstream, task)
    print(report.header(place, task, asked.layer), flush=True)
    todays = ours.engines_choice(task.shape, task.tokens)
    run_of_ours = ours.tuned(flags, _fresh(scratch / "ours"), scratch / "tables")
    of_ours = ours.choice(scratch / "tables", task.shape, place.gpu, task.tokens)
    of_theirs = _run_theirs(upstream, task, asked, arguments, scratch / "theirs")
    print(f"\n{report.seconds(run_of_ours, of_theirs.effort)}\n", flush=True)
    outcome = _raced(task, place.gpu, todays, of_theirs.table, of_ours)
    print(report.choices(outcome))
    if of_theirs.table is None:
        print("\nUpstream's script was stopped before it wrote a table: what it would have chosen is not known.")
    document = report.document(place, task, asked.layer) | report.results(run_of_ours, of_theirs.effort, outcome)
    print(f"\n{json.dumps(document)}")


def _at_least_1(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected 1 or more")
    return number


def parser() -> argparse.ArgumentParser:
    """The flags; those that say which layer are the same in both commands."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--upstream", type=Path, required=True, metavar="FOLDER", help="with upstream's tuning scripts")
    flags.add_argument("--model", required=True, help="a built-in name, also with -FP8 at its end, or a model's folder")
    flags.add_argument("--tp-size", "--tp", type=_at_least_1, default=1)
    flags.add_argument("--ep-size", "--ep", type=_at_least_1, default=1)
    flags.add_argument("--dtype", default="auto")
    flags.add_argument("--per-channel-quant", action="store_true")
    flags.add_argument("--disable-shared-experts-fusion", action="store_true")
    flags.add_argument("--batch-size", type=_at_least_1, required=True, metavar="M")
    flags.add_argument(
        "--every", type=_at_least_1, default=1, metavar="N", help="give upstream one of N configurations"
    )
    flags.add_argument("--seconds", type=float, metavar="S", help="stop upstream's script after so many")
    flags.add_argument("--ray-stand-in", action="store_true", help="run upstream's script without Ray, on one GPU")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 an error in one line, 2 usage."""
    given = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join(["python", "-m", "benchmarks.tune_vs_upstream", *given])
    with tempfile.TemporaryDirectory(prefix="tune_vs_upstream-") as scratch:
        try:
            run(parser().parse_args(given), command, Path(scratch))
        except MoEExtError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
