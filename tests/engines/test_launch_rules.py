"""The rules of launches against the engines' own kernels, run in Triton's interpreter over a grid of tiles a scheme.

The rules must be exact: what breaks one computes wrong results, and what keeps them all computes right ones. The
interpreter also runs what Triton cannot compile; those rules are held against the compiler.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.errors import CompilationError

from sglang_moe_ext.core import MoEShape, Projection, Quantization, TileConfig
from sglang_moe_ext.engines import launch_rules
from sglang_moe_ext.engines.installed_engines import parse_version
from sglang_moe_ext.engines.launch_rules import RULES, KernelLaunch, RuledConfig
from tests.engines.children.dot import multiply
from tests.engines.installed import run_in_engine, run_in_vllm, vllm_environment

CHILDREN = Path(__file__).parent / "children"
RIGHT = 3e-3
"""Of the relative error: see tests/engines/test_runner_every_scheme.py."""
WRONG_NUMBERS = [rule for rule in RULES if "BLOCK_SIZE_" in rule.name and "scales" in rule.name]
SCHEMES: dict[str, Quantization] = {
    "not quantized": Quantization(),
    "fp8 block": Quantization("fp8_w8a8", (32, 32)),
    "fp8 block, narrow": Quantization("fp8_w8a8", (16, 32)),
    "fp8 block, no power of two": Quantization("fp8_w8a8", (48, 48)),
    "fp8 block, long": Quantization("fp8_w8a8", (64, 96)),
    "fp8 channel": Quantization("fp8_w8a8", per_channel=True),
    "fp8 tensor": Quantization("fp8_w8a8"),
    "int8 block": Quantization("int8_w8a8", (32, 32)),
    "int8 channel": Quantization("int8_w8a8", per_channel=True),
    "int8 weights, channel": Quantization("int8_w8a16", per_channel=True),
    "int8 weights, group": Quantization("int8_w8a16", (0, 32)),
    "int4 group": Quantization("int4_w4a16", (0, 32)),
}
SIDES = (16, 32, 64, 128)
TILES = [TileConfig(16, block_n, block_k, 2, 4, 2) for block_n, block_k in itertools.product(SIDES, SIDES)]
TILES += [TileConfig(block_m, 32, 64, 2, 4, 2) for block_m in (32, 64, 128)]
PROJECTIONS: tuple[Projection, ...] = ("up", "down")


def shape_of(scheme: str) -> MoEShape:
    size = {"fp8 block, no power of two": (96, 96), "fp8 block, long": (192, 192)}.get(scheme, (64, 64))
    return MoEShape(3, *size, 2, SCHEMES[scheme])


def launch(engine: Any, version: str, scheme: str, projection: Projection, tile: TileConfig) -> KernelLaunch:
    return KernelLaunch(engine, parse_version(version), tile, shape_of(scheme), projection)


GEMMS = [(scheme, projection, tile) for scheme in SCHEMES for projection in PROJECTIONS for tile in TILES]


@functools.cache
def sglang_errors(version: str) -> list[float]:
    """Of each of GEMMS, the relative error of the engine's kernel."""
    gemms = [
        {
            "shape": dataclasses.asdict(shape_of(scheme)),
            "projection": projection,
            "tile": list(dataclasses.astuple(tile)),
            "change": "",
        }
        for scheme, projection, tile in GEMMS
    ]
    environment = {"TRITON_INTERPRET": "1"}
    asked = {"gemms": gemms, "names": []}
    found = run_in_engine(version, CHILDREN / "dtypes.py", asked, env=environment, timeout=900)["errors"]
    return [float("inf") if error is None else error for error in found]


def keeps_scales(asked: KernelLaunch) -> bool:
    return all(rule.keeps(asked) for rule in WRONG_NUMBERS)


@pytest.mark.parametrize("version", ["0.5.23"])
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_sglangs_kernel_computes_right_results_just_where_the_rules_say(
    scheme: str, projection: Projection, version: str
) -> None:
    errors = zip(GEMMS, sglang_errors(version), strict=True)
    of_scheme = {tile: error for (of, side, tile), error in errors if (of, side) == (scheme, projection)}
    wrong = {tile for tile, error in of_scheme.items() if error > RIGHT}
    assert wrong == {tile for tile in TILES if not keeps_scales(launch("sglang", version, scheme, projection, tile))}


VLLM_SCHEMES = ["not quantized", "fp8 block", "fp8 block, narrow", "fp8 block, long", "fp8 channel"]
"""vLLM's launcher for groups along K chooses its own tiles."""
VLLM_TILES = [TileConfig(16, block_n, block_k, 2, 4, 2) for block_n in (32, 64) for block_k in (32, 64, 128)]
"""The child runs the whole layer with each."""


@functools.cache
def vllm_errors(version: str) -> list[float]:
    asked = [
        {"shape": dataclasses.asdict(shape_of(scheme)), "tokens": 17, "config": list(dataclasses.astuple(tile))}
        for scheme in VLLM_SCHEMES
        for tile in VLLM_TILES
    ]
    environment = vllm_environment(version) | {"TRITON_INTERPRET": "1"}
    return [case["up"] for case in run_in_vllm(CHILDREN / "vllm_layer.py", asked, environment, timeout=900)]


@pytest.mark.parametrize("scheme", VLLM_SCHEMES)
def test_vllms_kernel_computes_right_results_just_where_the_rules_say(scheme: str) -> None:
    version = "0.33.0"
    cases = itertools.product(VLLM_SCHEMES, VLLM_TILES)
    errors = zip(cases, vllm_errors(version), strict=True)
    wrong = {tile for (of, tile), error in errors if of == scheme and not error <= RIGHT}
    block = SCHEMES[scheme].block_shape
    clamped = {
        tile: tile if block is None else dataclasses.replace(tile, block_k=min(tile.block_k, *block))
        for tile in VLLM_TILES
    }
    assert wrong == {
        tile for tile, runs in clamped.items() if not keeps_scales(launch("vllm", version, scheme, "up", runs))
    }


def compiles(block_k: int, dtype: str) -> bool:
    signature = {"a": f"*{dtype}", "b": f"*{dtype}", "c": "*fp32", "side": "constexpr", "block_k": "constexpr"}
    source = ASTSource(multiply, signature, constexprs={"side": 32, "block_k": block_k})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    except CompilationError:
        return False
    return True


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("bf16", Quantization()), ("fp8e4nv", Quantization("fp8_w8a8")), ("i8", Quantization("int8_w8a8"))],
    ids=["16 bits", "fp8", "int8"],
)
@pytest.mark.parametrize("block_k", [1, 8, 16, 32, 48])
def test_a_side_along_k_compiles_just_where_the_rules_say(block_k: int, dtype: str, quantization: Quantization) -> None:
    shape = MoEShape(4, 64, 128, 2, quantization)
    ruled = launch_rules.apply(KernelLaunch("sglang", (0, 5, 23), TileConfig(32, 32, block_k, 1, 4, 2), shape, "up"))
    is_compiled = compiles(block_k, "fp32" if dtype == "i8" else dtype) if dtype != "i8" else None
    assert is_compiled in (None, isinstance(ruled, RuledConfig))
    assert isinstance(ruled, RuledConfig) == (
        block_k in ((32,) if shape.quantization.activation_bits == 8 else (16, 32))
    )


ABSURD = {
    "a tile that was not compiled within 240 s": TileConfig(1024, 1024, 16, 1, 32, 1),
    "an accumulator of a thousand registers": TileConfig(256, 512, 32, 1, 4, 2),
    "operands that no GPU holds": TileConfig(16, 1024, 512, 1, 8, 1),
    "rows that are no power of two": TileConfig(48, 64, 64, 1, 4, 2),
    "warps that are no power of two": TileConfig(16, 64, 64, 1, 3, 2),
    "more threads than a block has": TileConfig(16, 64, 64, 1, 64, 2),
    "a product too short": TileConfig(16, 64, 8, 1, 4, 2),
}


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
@pytest.mark.parametrize("tile", ABSURD.values(), ids=ABSURD)
def test_what_cannot_be_compiled_in_time_is_refused(tile: TileConfig, engine: Any) -> None:
    assert not isinstance(launch_rules.apply(launch(engine, "0.5.23", "not quantized", "up", tile)), RuledConfig)


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_what_is_mended_keeps_every_rule_and_the_rows_of_its_blocks(tile: TileConfig, scheme: str, engine: Any) -> None:
    ruled = launch_rules.apply(launch(engine, "0.5.23", scheme, "up", dataclasses.replace(tile, use_tma=True)))
    if isinstance(ruled, RuledConfig):
        assert all(rule.keeps(launch(engine, "0.5.23", scheme, "up", ruled.config)) for rule in RULES)
        assert ruled.config.block_m == tile.block_m


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
@pytest.mark.parametrize("block", [None, (128, 128), (64, 64), (32, 32), (96, 96), (128, 64)])
@pytest.mark.parametrize("scheme", ["fp8_w8a8", "int8_w8a8"])
def test_the_plain_tile_keeps_every_rule(scheme: Any, block: Any, engine: Any) -> None:
    shape = MoEShape(4, 256, 512, 2, Quantization(scheme, block))
    plain = launch_rules.plain_tile(16, shape)
    assert all(rule.keeps(KernelLaunch(engine, (0, 5, 23), plain, shape, "down")) for rule in RULES)
