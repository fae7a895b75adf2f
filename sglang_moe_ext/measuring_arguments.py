"""The flags that say how to measure, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from sglang_moe_ext.core import PROJECTIONS, Gpu, MoEExtError, MoEShape, Projection
from sglang_moe_ext.engines.sglang import tma
from sglang_moe_ext.engines.sglang.installation import Installation
from sglang_moe_ext.tuning import captured, fleet, ray_fleet, routing
from sglang_moe_ext.tuning.request import Measuring
from sglang_moe_ext.tuning.search import EffortName

_FIRST_TMA_SM = 90


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the flags; those that upstream's tuning scripts have keep their names and meaning."""
    how = parser.add_argument_group("how to measure")
    how.add_argument(
        "--effort",
        choices=get_args(EffortName),
        default="full",
        help="quick: half a minute; full: a minute or two; exhaustive: all 1,920 candidates (default full)",
    )
    how.add_argument("--budget", type=float, metavar="SECONDS", help="search no longer than that, start-up apart")
    how.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        type=Path,
        metavar="FOLDER",
        help="go on with a run that was interrupted: the newest of this layer, or the one in FOLDER",
    )
    how.add_argument("--gpus", metavar="WHICH", help=fleet.GPUS_HELP)
    how.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help=ray_fleet.RAY_HELP)
    how.add_argument(
        "--routing",
        choices=routing.NAMES,
        default=routing.MIXED.name,
        help="how tokens choose experts: alike, by Zipf's law, or both in turn (default mixed)",
    )
    how.add_argument(
        "--topk-ids-dir", type=Path, metavar="FOLDER", help="measure with the topk_ids that a server dumped there"
    )


def measuring(arguments: argparse.Namespace, shape: MoEShape, gpu: Gpu, engine: Installation) -> Measuring:
    """How the flags want it measured.

    Raises:
        MoEExtError: they make no sense together, or name what is not there.
    """
    if arguments.budget is not None and arguments.budget <= 0:
        raise MoEExtError(f"--budget {arguments.budget:g}: expected a positive number of seconds")
    if arguments.ray is not None and arguments.gpus is not None:
        raise MoEExtError("--gpus and --ray: choose one; Ray decides itself which of its GPUs are free")
    return Measuring(
        effort=arguments.effort,
        with_tma=_with_tma(shape, gpu, engine),
        budget_s=arguments.budget,
        routing=_routing(arguments, shape),
        gpus=() if arguments.ray is not None else _gpus(arguments.gpus, gpu),
        ray=arguments.ray,
        resume=arguments.resume,
    )


def _with_tma(shape: MoEShape, gpu: Gpu, engine: Installation) -> tuple[Projection, ...]:
    if gpu.sm < _FIRST_TMA_SM:
        return ()
    is_right: dict[Projection, bool] = {
        "up": tma.up_tma_is_right(shape.quantisation, engine.version),
        "down": tma.down_tma_is_right(shape.quantisation),
    }
    return tuple(projection for projection in PROJECTIONS if is_right[projection])


def _gpus(wanted: str | None, gpu: Gpu) -> tuple[str, ...]:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return tuple(fleet.visible_gpus(wanted, gpu.device_name, names))


def _routing(arguments: argparse.Namespace, shape: MoEShape) -> routing.Source:
    if arguments.topk_ids_dir is None:
        return routing.SOURCES[arguments.routing]
    return captured.source(arguments.topk_ids_dir, shape)
