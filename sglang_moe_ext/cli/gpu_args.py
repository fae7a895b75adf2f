"""The GPU and the numbers of tokens that the flags of a command name, for the layer that they name."""

from __future__ import annotations

import argparse

from sglang_moe_ext.cli.layer_args import LayerArgs
from sglang_moe_ext.core import Gpu, GpuError, ModelError
from sglang_moe_ext.gpu import memory, specs
from sglang_moe_ext.gpu.names import find_gpu

MOST_TOKENS = 1_000_000


def print_memory_note(layer: LayerArgs, gpu: Gpu) -> None:
    """Say so where the experts of one rank cannot lie in the memory of the GPU."""
    why = memory.why_too_large(layer.shape, gpu, layer.moe_layers)
    if why is not None:
        print(f"note: {layer.name}: {why}")


def gpu_of(arguments: argparse.Namespace, layer: LayerArgs) -> tuple[Gpu, bool]:
    """(The GPU that is meant, whether this machine has it).

    Raises:
        GpuError: none is named, and there is none here; or it is unknown.
    """
    wanted = arguments.gpu or layer.device_name
    try:
        here = specs.detect()
    except GpuError:
        if wanted is None:
            raise
        here = None  # an unknown GPU here does not matter for another one
    if wanted is None:
        if here is None:
            raise GpuError("this machine has no GPU: name the one that is meant, such as --gpu RTX_4090 or --gpu H200")
        return here, True
    if here is not None and wanted in (here.device_name, here.device_name.replace(" ", "_")):
        return here, True
    gpu = find_gpu(wanted)
    return gpu, here is not None and here.device_name == gpu.device_name


def tokens_of(arguments: argparse.Namespace, default: tuple[int, ...]) -> tuple[int, ...]:
    """The batch sizes, in order and once each.

    Raises:
        ModelError: one of them is impossible.
    """
    tokens: list[int] = arguments.batch_size or list(default)
    wrong = next((m for m in tokens if not 1 <= m <= MOST_TOKENS), None)
    if wrong is not None:
        raise ModelError(f"--batch-size {wrong}: expected numbers of tokens from 1 to {MOST_TOKENS}")
    return tuple(sorted(set(tokens)))
