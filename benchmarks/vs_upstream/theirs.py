"""Upstream's own tuning script, run unmodified on one batch size: what it took, or would have taken, and what it chose.

The script lies in SGLang's source tree, benchmark/kernels/fused_moe_triton, and in no wheel. Its contract here: the
flags below, a table in the current folder, and common_utils.py beside it (read at 00e96592 and 00f0b462).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.vs_upstream.timed_run import Run, timed
from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError, MoEShape, Table
from sglang_moe_ext.tables import config_table

SCRIPT = "tuning_fused_moe_triton.py"
LIBRARY = "common_utils.py"
RAY_STAND_IN = Path(__file__).parents[1] / "ray_stand_in"

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""The model is a folder here; its config.json is all that the script reads of it."""
_ASKED = """
import json, sys
from common_utils import get_configs_compute_bound, get_model_config
model, tp, ep, is_unfused = json.loads(sys.argv[1])
told = get_model_config(model, tp, ep, is_unfused)
layer = {name: told[name] for name in ("num_experts", "topk", "hidden_size", "shard_intermediate_size", "block_shape")}
print(json.dumps([layer, get_configs_compute_bound()]))
"""


@dataclass(frozen=True, slots=True)
class Task:
    """What both commands are asked: a layer, by the flags that they share, and one batch size."""

    model: Path
    tp: int
    ep: int
    is_unfused: bool
    shape: MoEShape
    tokens: int


@dataclass(frozen=True, slots=True)
class Upstream:
    """Upstream's folder, and the environment that its script runs in."""

    folder: Path
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Layer:
    """The layer as upstream's script launches it: `experts` may count a fused shared expert that `top_k` does not."""

    experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    block_shape: tuple[int, ...] | None

    def is_of(self, shape: MoEShape) -> bool:
        """True where it is the layer of that shape."""
        mine = (self.experts, self.top_k, self.hidden_size, self.intermediate_size)
        its = (shape.experts, shape.top_k, shape.hidden_size, shape.intermediate_size)
        return mine == its and self.block_shape == shape.quantization.block_shape

    def __str__(self) -> str:
        block = f",block_shape={list(self.block_shape)}" if self.block_shape else ""
        return f"E={self.experts},N={self.intermediate_size},K={self.hidden_size},topk={self.top_k}{block}"


@dataclass(frozen=True, slots=True)
class Asked:
    """What upstream's own functions say: the layer, and the configurations that it would try."""

    layer: Layer
    space: tuple[dict[str, int], ...]


def found(folder: Path, environment: Mapping[str, str], *, ray_stand_in: bool) -> Upstream:
    """Upstream's scripts in that folder, to be run without anything of ours but that stand-in.

    Raises:
        EngineError: they are not there.
    """
    folder = folder.absolute()
    missing = next((name for name in (SCRIPT, LIBRARY) if not (folder / name).is_file()), None)
    if missing is not None:
        raise EngineError(
            f"--upstream {folder}: no {missing} there; expected benchmark/kernels/fused_moe_triton of SGLang's sources"
        )
    paths = [RAY_STAND_IN] if ray_stand_in else []
    # The script runs in another folder than we do.
    paths += [folder, *(Path(path).absolute() for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path)]
    return Upstream(
        folder, {**environment, **_OFFLINE, "PYTHONPATH": os.pathsep.join(map(str, paths)), env.DISABLE: "1"}
    )


def ask(upstream: Upstream, task: Task) -> Asked:
    """Raises EngineError where upstream's functions fail, or know no such model."""
    request = json.dumps([str(task.model), task.tp, task.ep, task.is_unfused])
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ASKED, request],
        capture_output=True,
        text=True,
        env=dict(upstream.environment),
        check=False,
    )
    said = (child.stderr if child.returncode else child.stdout).strip().splitlines() or ["it said nothing"]
    if child.returncode != 0:
        raise EngineError(f"upstream's {LIBRARY} failed on {task.model}: {said[-1]}")
    layer, space = json.loads(said[-1])
    block = layer["block_shape"]
    return Asked(
        Layer(
            experts=layer["num_experts"],
            top_k=layer["topk"],
            hidden_size=layer["hidden_size"],
            intermediate_size=layer["shard_intermediate_size"] // 2,
            block_shape=None if block is None else tuple(block),
        ),
        tuple(config for config in space if block is None or block[1] % config["BLOCK_SIZE_K"] == 0),
    )


def tuned(
    upstream: Upstream, task: Task, configs: Sequence[dict[str, int]] | None, folder: Path, limit_s: float | None
) -> Run:
    """Run the script in that folder, where its table then lies; stop it after `limit_s`. No configurations: all."""
    flags: list[str] = []
    if configs is not None:
        space = folder / "space" / "configurations.json"
        space.parent.mkdir()
        space.write_text(json.dumps(configs), encoding="utf-8")
        flags = ["--search-space-file", str(space)]
    return timed([*_command(upstream, task), *flags], upstream.environment, folder, limit_s)


def _command(upstream: Upstream, task: Task) -> list[str]:
    quantization = task.shape.quantization
    return [
        *(sys.executable, "-W", "ignore", str(upstream.folder / SCRIPT), "--tune"),
        *("--model", str(task.model)),
        *("--tp-size", str(task.tp)),
        *("--ep-size", str(task.ep)),
        *("--dtype", quantization.scheme or "auto"),
        *("--batch-size", str(task.tokens)),
        *(["--per-channel-quant"] if quantization.per_channel else []),
        *(["--disable-shared-experts-fusion"] if task.is_unfused else []),
    ]


def table(folder: Path) -> Table | None:
    """What the script wrote, or None where it was stopped before.

    Raises:
        TableError: it is no table.
    """
    written = sorted(folder.glob("*.json"))
    return config_table.read(written[0]) if written else None
