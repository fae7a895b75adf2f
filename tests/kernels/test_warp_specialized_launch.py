"""What the launchers of the warp-specialized kernels refuse, and what they keep between launches."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Gluon has no interpreter", allow_module_level=True)
pytest.importorskip("triton.experimental.gluon")

from warp_specialized_offline import down, up

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.kernel_plans import WarpSpecializedDown, WarpSpecializedUp
from sglang_moe_ext.kernels import warp_specialized_launch
from sglang_moe_ext.kernels.warp_specialized_down import down_arguments
from sglang_moe_ext.kernels.warp_specialized_support import why_not_importable
from sglang_moe_ext.kernels.warp_specialized_up import up_arguments

UP, DOWN = WarpSpecializedUp(), WarpSpecializedDown()


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def rows(count: int) -> tuple[torch.Tensor, ...]:
    return tuple(meta(n, dtype=torch.int32) for n in (count, count // 128, 1))


def up_given(**changes: Any) -> Any:
    given: dict[str, Any] = {"a": meta(64, 256), "weights": meta(4, 512, 256), "out": meta(640, 256)} | changes
    return up_arguments(
        given["a"], given["weights"], given["out"], *rows(640), UP, pairs=128, top_k=2, experts_elsewhere=False,
        a_scale=given.get("a_scale"), weight_scale=given.get("weight_scale"), out_scale=given.get("out_scale"),
    )  # fmt: skip


def down_given(config: WarpSpecializedDown = DOWN, **changes: Any) -> Any:
    given: dict[str, Any] = {"a": meta(640, 256), "weights": meta(4, 512, 256), "out": meta(640, 512)} | changes
    ids, experts, padded = rows(640)
    return down_arguments(
        given["a"], given["weights"], given["out"], experts, padded, config, sorted_token_ids=ids, pairs=128,
        a_scale=given.get("a_scale"), weight_scale=given.get("weight_scale"), experts_elsewhere=False,
    )  # fmt: skip


FP8 = torch.float8_e4m3fn
REFUSED_UP = {
    "a K that is no whole stage": {"a": meta(64, 200), "weights": meta(4, 512, 200)},
    "columns that are no whole tile": {"weights": meta(4, 400, 256), "out": meta(640, 200)},
    "a of another K": {"a": meta(64, 128)},
    "rows that are not aligned": {"a": meta(64, 260)[:, :256]},
    "float8 without scales": {"a": meta(64, 256, dtype=FP8), "weights": meta(4, 512, 256, dtype=FP8)},
    "16 bits with scales of the output": {"out_scale": meta(640, 2, dtype=torch.float32)},
    "per-tensor scales": {
        "a": meta(64, 256, dtype=FP8), "weights": meta(4, 512, 256, dtype=FP8),
        "weight_scale": meta(4, dtype=torch.float32),
    },
}  # fmt: skip
REFUSED_DOWN = {
    "a of another K": {"a": meta(640, 128)},
    "an output of another size": {"out": meta(512, 512)},
    "an output in float8": {"out": meta(640, 512, dtype=FP8)},
    "pairs of CTAs in 16 bits": {"config": WarpSpecializedDown("pair", stages=3)},
    "scales of a alone": {"a_scale": meta(640, 2, dtype=torch.float32)},
}


@pytest.mark.parametrize("name", REFUSED_UP)
def test_up_refuses(name: str) -> None:
    with pytest.raises(MoEExtError, match=r"expected|take"):
        up_given(**REFUSED_UP[name])


@pytest.mark.parametrize("name", REFUSED_DOWN)
def test_down_refuses(name: str) -> None:
    with pytest.raises(MoEExtError, match=r"expected|take"):
        down_given(**REFUSED_DOWN[name])


def test_what_is_not_refused_is_launched() -> None:
    assert up_given()[0].fn.__name__ == "up_kernel"
    assert down_given()[0].fn.__name__ == "down_kernel"
    assert up("block", UP)[0].fn.__name__ == "up_block_kernel"
    assert down("block", DOWN)[0].fn.__name__ == "down_block_kernel"
    assert down("block", WarpSpecializedDown("pair", stages=3))[0].fn.__name__ == "down_pair_kernel"


def test_a_descriptor_is_made_once_and_keeps_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[Any, Any] = {}
    monkeypatch.setattr(warp_specialized_launch, "_descriptors", kept)
    weights = meta(4, 512, 256)
    first, again = (down_given(weights=weights)[1]["b_desc"] for _ in range(2))
    assert first is again
    assert not any(isinstance(descriptor.base, torch.Tensor) for descriptor in kept.values())


def test_a_known_launch_asks_the_compiler_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[Any, ...]] = []

    class Binary:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments: launched.append((grid, arguments))

    class Kernel:
        arg_names = ("x", "n")
        compiled = 0

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(**_: Any) -> Binary:
                self.compiled += 1
                return Binary()

            return run

    monkeypatch.setattr(warp_specialized_launch, "_binaries", {})
    kernel, x = Kernel(), meta(4)
    for _ in range(3):
        warp_specialized_launch.launch(kernel, 7, {"x": x, "n": 3, "num_warps": 4})
    assert kernel.compiled == 1
    assert launched == [((7, 1, 1), (x, 3))] * 2


def test_gluon_imports_here() -> None:
    assert why_not_importable() is None
