"""The flags that say how to measure, and what they mean."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from sglang_moe_ext.core import Gpu, MoEExtError, MoEShape
from sglang_moe_ext.engines.adapter import InstallationLike
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.tuning import config_args
from sglang_moe_ext.tuning.bench import captured_routing, routing
from sglang_moe_ext.tuning.request import MeasureOptions
from sglang_moe_ext.tuning.run import executor, ray_executor
from sglang_moe_ext.tuning.search.screening import EffortName

_EFFORT: EffortName = "full"
_LARGEST_SEED = 2**32 - 1


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the flags; those that upstream's tuning scripts have keep their names and meaning."""
    how = add_how_to(parser)
    how.add_argument("--budget", type=float, metavar="SECONDS", help="search no longer than that, start-up apart")
    how.add_argument(
        "--deadline",
        type=_parse_deadline,
        metavar="SECONDS",
        help="end by then, start-up included: batch sizes that were not compared by then are left out",
    )
    how.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        type=Path,
        metavar="FOLDER",
        help="go on with a run that was interrupted: the newest of this layer, or the one in FOLDER",
    )
    how.add_argument(
        "--tune", action="store_true", help=argparse.SUPPRESS
    )  # upstream's scripts want it; we tune anyway
    how.add_argument(
        "--use-deep-gemm", action="store_true", help=argparse.SUPPRESS
    )  # vLLM's script has it, for a kernel that no table configures
    given = parser.add_argument_group("instead of tuning, race what is given beside what the engine takes today")
    given.add_argument(
        "--configs",
        type=int,
        nargs="+",
        metavar="NUMBER",
        help=f"one configuration, for both GEMMs: {' '.join(config_args.NUMBERS)}",
    )
    given.add_argument(
        "--cmp-configs",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="tables as the engine reads them; of SGLang, a FILE_down.json beside one goes with it",
    )


def add_how_to(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that say how a run measures, and no others; the group that they are in."""
    how = parser.add_argument_group("how to measure")
    how.add_argument(
        "--effort",
        choices=get_args(EffortName),
        default=_EFFORT,
        help="binaries of each GEMM at each M: quick 24; full 96, about a minute on 16 cores; exhaustive all that the "
        "rules keep (default full)",
    )
    how.add_argument("--gpus", metavar="WHICH", help=executor.GPUS_HELP)
    how.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help=ray_executor.RAY_HELP)
    how.add_argument(
        "--routing",
        choices=routing.NAMES,
        default=routing.MIXED.name,
        help="how tokens choose experts: alike, by Zipf's law, or both in turn (default mixed)",
    )
    how.add_argument(
        "--topk-ids-dir", type=Path, metavar="FOLDER", help="measure with the topk_ids that a server dumped there"
    )
    how.add_argument(
        "--kernels",
        choices=("all", "engine"),
        default="all",
        help="race our own kernels as well, where they can serve (SGLang 0.5.11 and newer, sm_90 and newer), or the "
        "engine's alone (default all)",
    )
    how.add_argument("--seed", type=int, default=0, help="of the random weights, inputs and routings (default 0)")
    return how


@dataclass(frozen=True, slots=True)
class Deadline:
    """Of the whole command, however many layers it tunes: `ends` by time.monotonic()."""

    seconds: float
    ends: float


def _parse_deadline(text: str) -> Deadline:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of seconds") from None
    return Deadline(seconds, time.monotonic() + seconds)


def is_comparison(arguments: argparse.Namespace) -> bool:
    """True where the flags ask to race what is given, instead of tuning."""
    return arguments.configs is not None or bool(arguments.cmp_configs)


def check(arguments: argparse.Namespace) -> None:
    """Refuse what makes no sense whatever the layer and the GPU are.

    Raises:
        MoEExtError: the message names the flag.
    """
    seed = arguments.seed
    if arguments.use_deep_gemm:
        raise MoEExtError(
            "--use-deep-gemm: DeepGEMM reads no table, so there is nothing to tune: leave it out; "
            "`sglang-moe-ext bench --backends tuned deep_gemm` compares the two"
        )
    deadline = None if arguments.deadline is None else arguments.deadline.seconds
    for flag, seconds in (("--budget", arguments.budget), ("--deadline", deadline)):
        if seconds is not None and not 0 < seconds < math.inf:
            raise MoEExtError(f"{flag} {seconds:g}: expected a positive number of seconds")
    if not 0 <= seed <= _LARGEST_SEED:
        raise MoEExtError(f"--seed {seed}: expected a number from 0 to {_LARGEST_SEED}")
    if arguments.ray is not None and arguments.gpus is not None:
        raise MoEExtError("--gpus and --ray: choose one; Ray decides itself which of its GPUs are free")
    if arguments.topk_ids_dir is not None and arguments.routing != routing.MIXED.name:
        raise MoEExtError("--routing and --topk-ids-dir: choose one; both say how tokens choose experts")
    if arguments.predict:
        refuse_without_measuring(arguments, "--predict measures nothing: leave one of them out")
    if is_comparison(arguments):
        _check_comparison(arguments)


def _check_comparison(arguments: argparse.Namespace) -> None:
    flag = _comparing_flag(arguments)
    for word in ("dry_run", "resume", "budget", "deadline", "output_dir"):
        if getattr(arguments, word) not in (None, False):
            other = f"--{word.replace('_', '-')}"
            raise MoEExtError(f"{other} is about tuning, and {flag} only measures what is given: leave one of them out")


def refuse_without_measuring(arguments: argparse.Namespace, why: str) -> None:
    """Refuse the flags that nothing heeds in a run that does not measure; `why` says why not, and what to do.

    Raises:
        MoEExtError: one of them is given.
    """
    given = {
        _comparing_flag(arguments): is_comparison(arguments),
        "--resume": arguments.resume is not False,
        "--gpus": arguments.gpus is not None,
        "--ray": arguments.ray is not None,
        "--budget": arguments.budget is not None,
        "--deadline": arguments.deadline is not None,
        "--effort": arguments.effort != _EFFORT,
        "--topk-ids-dir": arguments.topk_ids_dir is not None,
        "--routing": arguments.routing != routing.MIXED.name,
        "--kernels": arguments.kernels != "all",
    }
    useless = next((flag for flag, is_given in given.items() if is_given), None)
    if useless:
        raise MoEExtError(f"{useless} is about measuring, and {why}")


def _comparing_flag(arguments: argparse.Namespace) -> str:
    return "--cmp-configs" if arguments.configs is None else "--configs"


def measure_options(
    arguments: argparse.Namespace, shape: MoEShape, gpu: Gpu, engine: InstallationLike
) -> MeasureOptions:
    """How the flags want it measured.

    Raises:
        MoEExtError: they name what is not there.
    """
    adapter = ENGINES[arguments.engine]
    return MeasureOptions(
        effort=arguments.effort,
        with_tma=adapter.gemms_with_tma(shape.quantization, engine.version, gpu.sm),
        budget_s=arguments.budget,
        deadline=None if arguments.deadline is None else arguments.deadline.ends,
        routing=_routing(arguments, shape),
        gpus=() if arguments.ray is not None else _gpus(arguments.gpus, gpu),
        ray=arguments.ray,
        resume=arguments.resume,
        with_own_kernels=arguments.kernels == "all" and adapter.has_own_kernels(engine.version, gpu.sm),
    )


def _gpus(wanted: str | None, gpu: Gpu) -> tuple[str, ...]:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return tuple(executor.visible_gpus(wanted, gpu.device_name, names))


def _routing(arguments: argparse.Namespace, shape: MoEShape) -> routing.RoutingSource:
    if arguments.topk_ids_dir is None:
        return routing.SOURCES[arguments.routing]
    return captured_routing.source(arguments.topk_ids_dir, shape)
