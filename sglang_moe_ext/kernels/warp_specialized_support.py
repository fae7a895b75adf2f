"""Whether the warp-specialized kernels import here, where Gluon is experimental. Imports neither torch nor Triton.

On which GPU and Triton they can be tried is said once, in `kernel_plans.why_not_warp_specialized`: ask that first.
"""

from __future__ import annotations


def why_not_importable() -> str | None:
    """None where the kernels' modules import; else the reason. Never raises: Triton's own kernels must stay usable."""
    try:
        import sglang_moe_ext.kernels.warp_specialized_down
        import sglang_moe_ext.kernels.warp_specialized_up  # noqa: F401
    except Exception as error:  # noqa: BLE001 - Gluon is experimental, and its import may fail in any way
        return f"Gluon cannot be imported: {type(error).__name__}: {error}"
    return None
