"""Tables and kernel plans that no engine ships, in a scratch store: a server that runs them reads ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import EngineError, GpuError, MoEShape, Table, TileConfig
from sglang_moe_ext.engines.sglang import installation, table_names
from sglang_moe_ext.engines.table_names import TableNaming
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.kernel_plans import DownConfig, KernelPlan, UpConfig
from sglang_moe_ext.serving.kernel_selection import SHORTEST_US
from sglang_moe_ext.tables import config_table, plan_table
from sglang_moe_ext.tables.plan_table import KernelEntry
from sglang_moe_ext.tables.provenance import TuningRun

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
TILE = TileConfig(block_m=32, block_n=64, block_k=64, group_m=4, num_warps=4, num_stages=3)
"""Legal for 16 bits on every GPU since Ampere; the engine's defaults have other tiles."""
TABLE: Table = dict.fromkeys(TOKENS, TILE)
TOO_LARGE = TileConfig(block_m=128, block_n=256, block_k=128, group_m=8, num_warps=8, num_stages=5)
"""491,520 bytes of shared memory in 16 bits: more than any GPU has, so that the guard must make it smaller."""
PLAN = KernelPlan(UpConfig(128, 128, 64, 8, 8, 4), DownConfig(128, 256, 64, 8, 8, 4, half_stores=True))
PLANNED_TOKENS = (512, 4096)
"""Between them PLAN runs."""
CPU_DEVICE = "NVIDIA H200"
"""What the servers of tests/servers believe in."""


@dataclass(frozen=True, slots=True)
class Here:
    """What names a table on this machine."""

    device_name: str
    triton: str


def here(*, is_cpu: bool) -> Here:
    """Raises GpuError or EngineError where there is nothing to run a server on."""
    triton = installation.running_triton()
    if triton is None:
        raise EngineError("Triton is not installed here: run this where the engine runs")
    if is_cpu:
        return Here(CPU_DEVICE, triton)
    gpu = specs.detect()
    if gpu is None:
        raise GpuError("this machine has no GPU: run this where there is one, or with --cpu")
    return Here(gpu.device_name, triton)


def glm_layers(tp: int) -> tuple[MoEShape, ...]:
    """Layers as which GLM-4.7-Flash may be launched on `tp` ranks, with and without its fused shared expert, TP or EP.

    The log says which of them was.
    """
    whole, part, of_rank = 1536, 1536 // tp, 64 // tp
    return (
        MoEShape(65, part, 2048, 5, fused_shared=1),
        MoEShape(64, part, 2048, 4),
        MoEShape(of_rank, whole, 2048, 4, ep=tp),
        MoEShape(of_rank + 1, whole, 2048, 5, ep=tp, fused_shared=1),
    )


def write(
    folder: Path,
    shapes: Iterable[MoEShape],
    place: Here,
    table: Table = TABLE,
    *,
    plan: KernelPlan | None = PLAN,
    naming: TableNaming = table_names.NAMING,
) -> list[Path]:
    """The tables of these layers, up and down alike, with that plan beside each; `folder` has the `triton_*` folder."""
    versioned = folder / table_names.version_folder(place.triton)
    versioned.mkdir(parents=True, exist_ok=True)
    written = []
    for shape in shapes:
        path = versioned / naming.file_name(naming.key(shape, place.device_name))
        path.write_text(config_table.to_json(table), encoding="utf-8")
        if plan is not None:
            plan_table.put(plan_table.path_beside(path), _entries(shape, plan, PLANNED_TOKENS))
        written.append(path)
    return written


def write_store(store: Path, shapes: Iterable[MoEShape], place: Here, *, plan: KernelPlan | None = PLAN) -> list[Path]:
    """The same as a user's store has them for SGLang."""
    return write(store / "tables" / "sglang", shapes, place, plan=plan)


def _entries(shape: MoEShape, plan: KernelPlan, tokens: Sequence[int]) -> dict[int, KernelEntry]:
    run = TuningRun("", "", "", str(shape), "", "", None, None, None, None, 0, "")
    return {m: KernelEntry(plan, run, {"us": SHORTEST_US}) for m in tokens}
