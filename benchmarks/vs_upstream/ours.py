"""Our own tuning command, run as a user would; and what the engine takes before it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.vs_upstream.timed_run import Run, timed
from sglang_moe_ext.cli import layer_args, layer_flags
from sglang_moe_ext.core import EngineError, Gpu, MoEShape
from sglang_moe_ext.engines.lookup_probe import LookupRequest
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.engines.sglang import lookup_probe
from sglang_moe_ext.tuning import install_target
from sglang_moe_ext.tuning.bench.messages import Pair
from sglang_moe_ext.tuning.config_args import pairs_of_tables, parse_tables
from sglang_moe_ext.tuning.incumbents import pairs_of

COMMAND = (sys.executable, "-m", "sglang_moe_ext.tune")


def flags_of(arguments: argparse.Namespace, model: str) -> list[str]:
    """The flags of our command that say which layer."""
    return [
        *("--model", model),
        *("--tp-size", str(arguments.tp_size)),
        *("--ep-size", str(arguments.ep_size)),
        *("--dtype", arguments.dtype),
        *(["--per-channel-quant"] if arguments.per_channel_quant else []),
        *(["--disable-shared-experts-fusion"] if arguments.disable_shared_experts_fusion else []),
        *("--batch-size", str(arguments.batch_size)),
    ]


def shape_of(flags: Sequence[str]) -> MoEShape:
    """Raises MoEExtError where the flags mean no layer."""
    parser = argparse.ArgumentParser()
    layer_flags.add_to(parser)
    return layer_args.parse_layer(parser.parse_args(flags)).shape


def tuned(flags: Sequence[str], environment: Mapping[str, str], output_dir: Path) -> Run:
    """The command, to its end, which writes its tables below that folder.

    Raises:
        EngineError: it failed.
    """
    run = timed([*COMMAND, *flags, "--output-dir", str(output_dir)], environment, Path.cwd())
    if run.status:
        raise EngineError(f"our own command failed with exit status {run.status}: {run.last_words}")
    return run


def choice(output_dir: Path, shape: MoEShape, gpu: Gpu, tokens: int) -> Pair:
    """What the command chose.

    Raises:
        EngineError: it wrote no table of that name.
    """
    name = install_target.table_names(ENGINES["sglang"], shape, gpu.device_name)[False]
    written = [path for path in output_dir.rglob("*.json") if path.name == name]
    if not written:
        raise EngineError(f"our own command wrote no {name} below {output_dir}")
    (tables,) = parse_tables(written[:1])
    return pairs_of_tables(tables.up, tables.down, [tokens])[tokens]


def engines_choice(shape: MoEShape, tokens: int) -> Pair:
    """Raises EngineError where the engine cannot be asked."""
    return pairs_of(lookup_probe.ALONE.ask(LookupRequest(shape, [tokens])))[tokens]
