"""The warp-specialized kernels compiled for a Hopper GPU that need not be here: no spills, fitting shared memory."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter", allow_module_level=True)
pytest.importorskip("triton.experimental.gluon")

from offline_down import waits_first
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from warp_specialized_offline import barriers_chosen_outside, compiled, down, local_accesses, machine_code, up

from sglang_moe_ext.kernel_plans import WarpSpecializedDown, WarpSpecializedUp, why_not_warp_specialized
from sglang_moe_ext.kernels.compiled import resources_of

SMEM_PER_BLOCK, SMEM_PER_MULTIPROCESSOR, RESERVED = 232_448, 233_472, 1024
UP, WIDE, PAIR = WarpSpecializedUp(), WarpSpecializedDown("wide"), WarpSpecializedDown("pair", stages=3)
# (projection, kind, config, experts elsewhere, registers a thread before setmaxnreg, bytes of shared memory); the same
# for Triton 3.6.0, 3.7.1 and 3.8.0, 2026-11-26.
KERNELS: dict[str, tuple[Any, str, Any, bool, int, int]] = {
    "up-bf16": (up, "bf16", UP, False, 168, 229_640),
    "up-channel": (up, "channel", UP, False, 168, 229_640),
    "up-block": (up, "block", UP, False, 168, 213_288),
    "down-bf16": (down, "bf16", WIDE, False, 168, 229_640),
    "down-fp16-elsewhere": (down, "fp16", WIDE, True, 168, 229_640),
    "down-channel": (down, "channel", WIDE, False, 168, 229_640),
    "down-block": (down, "block", WIDE, False, 168, 229_640),
    "down-pair": (down, "block", PAIR, False, 128, 114_880),
}


@lru_cache
def binary(name: str) -> Any:
    projection, kind, config, elsewhere, _, _ = KERNELS[name]
    return compiled(*projection(kind, config, elsewhere=elsewhere))


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_fits_and_does_not_spill(name: str) -> None:
    *_, registers, smem_bytes = KERNELS[name]
    needs = resources_of(binary(name))
    assert needs.spill_bytes == 0
    assert needs.registers <= registers
    assert needs.smem_bytes <= min(smem_bytes, SMEM_PER_BLOCK)


@pytest.mark.parametrize("name", KERNELS)
def test_products_are_asynchronous_and_registers_are_moved_to_the_consumers(name: str) -> None:
    sass = machine_code(binary(name))
    product = "HGMMA" if KERNELS[name][1] in ("bf16", "fp16") else "QGMMA"
    assert len(re.findall(rf"\b{product}\b", sass)) >= 8
    assert "UTMALDG" in sass and "UTMASTG" in sass
    assert "USETMAXREG" in sass
    assert local_accesses(sass) == 0
    assert ("LDGSTS" in sass) == name.startswith("up")


@pytest.mark.parametrize("name", KERNELS)
def test_it_is_set_up_while_the_kernel_before_it_ends(name: str) -> None:
    kernel = binary(name)
    ptx = kernel.asm["ptx"]
    assert kernel.metadata.launch_pdl
    assert waits_first(ptx)
    assert ptx.find("mbarrier.init") < ptx.find("griddepcontrol.wait")


@pytest.mark.parametrize(("projection", "config"), [(up, UP), (down, PAIR)], ids=["up", "pair"])
def test_looking_for_experts_of_this_rank_costs_at_most_some_words_a_tile(projection: Any, config: Any) -> None:
    """None with Triton 3.6.0 and 3.7.1; 32 and 48 bytes with 3.8.0, outside the loops over k."""
    assert resources_of(compiled(*projection("block", config, elsewhere=True))).spill_bytes <= 48


def test_two_ctas_of_the_pair_fit_on_a_multiprocessor() -> None:
    assert 2 * (resources_of(binary("down-pair")).smem_bytes + RESERVED) <= SMEM_PER_MULTIPROCESSOR


@pytest.mark.parametrize("name", KERNELS)
def test_each_barrier_of_a_step_is_chosen_by_that_step(name: str) -> None:
    loops, outside = barriers_chosen_outside(binary(name).asm["ttgir"])
    assert loops >= 2
    assert not outside


@gluon.jit
def two_names_of_one_value(tiles, steps):  # type: ignore[no-untyped-def]
    """What hung: `last` and `slot` are one before the inner loop, which assigns both."""
    barriers = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(4):
        mbarrier.init(barriers.index(s), count=1)
    slot = 0
    for _ in range(tiles):
        last = slot
        for k in range(steps):
            mbarrier.wait(barriers.index(slot), k & 1)
            mbarrier.arrive(barriers.index(last))
            last = slot
            slot = (slot + 1) % 4


def test_the_pattern_that_hung_is_seen() -> None:
    kernel = compiled(two_names_of_one_value, {"tiles": 5, "steps": 7, "num_warps": 4})
    loops, outside = barriers_chosen_outside(kernel.asm["ttgir"])
    assert loops == 1
    assert len(outside) == 1


def test_one_binary_serves_every_batch() -> None:
    kernel, arguments = up("block", UP)
    other = compiled(kernel, arguments | {"pairs": arguments["pairs"] * 4})
    assert other.asm["ptx"] == binary("up-block").asm["ptx"]


@pytest.mark.parametrize(
    ("sm", "triton", "is_supported"),
    [(90, "3.6.0", True), (90, "3.7.1", True), (90, "3.8.0+git1", True), (90, "3.5.1", False), (90, "3.9.0", False),
     (100, "3.7.1", False), (89, "3.7.1", False), (90, "unknown", False)],
)  # fmt: skip
def test_the_gate_names_why_a_gpu_or_a_release_is_left_out(sm: int, triton: str, is_supported: bool) -> None:
    assert (why_not_warp_specialized(sm, triton) is None) == is_supported
