"""Where the warp-specialized kernels can run, and their choices. Imports neither torch nor Triton."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

SM = 90
"""wgmma and setmaxnreg are Hopper's alone."""
OLDEST_TRITON, FIRST_UNTRIED_TRITON = (3, 6), (3, 9)
"""Compiled and tested with 3.6.0, 3.7.1 and 3.8.0. Gluon is experimental: a name may change in any release."""


@dataclass(frozen=True, slots=True)
class WarpSpecializedUp:
    """Choices of the up kernels, whose tile is 128 rows by 2 x 128 columns.

    Where `persistent`, one program a multiprocessor takes tile after tile; else each has one, which keeps tiles that
    share weights together in time: better where K is long.
    """

    group_m: int = 8
    stages: int = 4
    persistent: bool = True

    def __str__(self) -> str:
        return (
            f"warp-specialized 128x(2x128) G{self.group_m} s{self.stages}{'' if self.persistent else ' one tile each'}"
        )


@dataclass(frozen=True, slots=True)
class WarpSpecializedDown:
    """Choices of the down kernels.

    `form`: "wide" has tiles of 128x256; "pair", for block-wise float8 alone, has two programs a multiprocessor, with
    tiles of 128x128 and 3 stages at most.
    """

    form: Literal["wide", "pair"] = "wide"
    group_m: int = 8
    stages: int = 4
    persistent: bool = True

    def __str__(self) -> str:
        tile = "128x256" if self.form == "wide" else "2 CTAs of 128x128"
        return f"warp-specialized {tile} G{self.group_m} s{self.stages}{'' if self.persistent else ' one tile each'}"


def why_unsupported(sm: int, triton_version: str) -> str | None:
    """None where the kernels can be tried, else the reason, for a log line. Ask `why_not_importable` next."""
    if sm != SM:
        return f"the warp-specialized kernels are for sm_{SM}, this GPU is sm_{sm}"
    found = re.match(r"(\d+)\.(\d+)", triton_version)
    if found is None or not OLDEST_TRITON <= (int(found[1]), int(found[2])) < FIRST_UNTRIED_TRITON:
        return f"the warp-specialized kernels were tested with Triton 3.6 to 3.8, this is {triton_version}"
    return None


def why_not_importable() -> str | None:
    """None where the kernels' modules import; else the reason. Never raises: Triton's own kernels must stay usable."""
    try:
        import sglang_moe_ext.kernels.warp_specialized_down
        import sglang_moe_ext.kernels.warp_specialized_up  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"Gluon cannot be imported: {type(error).__name__}: {error}"
    return None
