"""Where SGLang lies, which version it is, and the folder its tables belong in; imports nothing of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines import installed_engines
from sglang_moe_ext.engines.installed_engines import parse_version, running_triton

__all__ = ["OLDEST", "SglangInstallation", "find", "parse_version", "running_triton"]

_OLD_PACKAGE = "srt/layers/moe/fused_moe_triton"
_NEW_PACKAGE = "srt/layers/moe/moe_runner/triton_utils"
_KERNEL_MODULES = (
    "kernels/ops/moe/fused_moe_triton_kernels",
    f"{_NEW_PACKAGE}/fused_moe_triton_kernels",
    f"{_OLD_PACKAGE}/fused_moe_triton_kernels",
)
_CONFIG_MODULES = (f"{_NEW_PACKAGE}/fused_moe_triton_config", f"{_OLD_PACKAGE}/fused_moe_triton_config")

OLDEST = (0, 5, 5)
"""The oldest release whose layout is known: it brought separate tables for the down projection."""


@dataclass(frozen=True, slots=True)
class SglangInstallation:
    """One SGLang. `root` is the folder of its package; `triton` the Triton it will run with, if there is one."""

    version_text: str
    root: Path
    triton: str | None

    @property
    def version(self) -> tuple[int, int, int]:
        return parse_version(self.version_text)

    @property
    def config_module(self) -> str:
        """The module of the table lookup: in the old package up to 0.5.10, in the new one after."""
        return self._module(_CONFIG_MODULES)

    @property
    def kernel_module(self) -> str:
        """The module of the Triton kernel: it left the package of the lookup with 0.5.16."""
        return self._module(_KERNEL_MODULES)

    @property
    def align_module(self) -> str:
        """The module that sorts tokens by expert into whole blocks; it never left the package of the lookup."""
        return self.config_module.rpartition(".")[0] + ".moe_align_block_size"

    @property
    def layer_module(self) -> str:
        """The module of the whole layer: sort, up, activation, down, sum; it lies beside the lookup."""
        return self.config_module.rpartition(".")[0] + ".fused_moe"

    @property
    def kernel_file(self) -> Path:
        return self._source(_KERNEL_MODULES)

    @property
    def configs_root(self) -> Path:
        """The folder that holds one folder of tables for each Triton."""
        return self._source(_CONFIG_MODULES).parent / "configs"

    def _source(self, candidates: tuple[str, ...]) -> Path:
        for candidate in candidates:
            path = self.root / f"{candidate}.py"
            if path.exists():
                return path
        raise EngineError(
            f"SGLang {self.version_text} at {self.root} has no {candidates[0].rsplit('/', 1)[1]}.py: "
            "this release is not supported yet"
        )

    def _module(self, candidates: tuple[str, ...]) -> str:
        relative = self._source(candidates).relative_to(self.root).with_suffix("")
        return ".".join(("sglang", *relative.parts))


def find() -> SglangInstallation | None:
    """The SGLang that `import sglang` would load here, or None.

    Raises:
        EngineError: it is older than anything we know.
    """
    found = installed_engines.find_distribution("sglang")
    if found is None:
        return None
    version_text, root = found
    if parse_version(version_text) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise EngineError(f"SGLang {version_text} at {root} is too old: expected {oldest} or newer")
    return SglangInstallation(version_text, root, running_triton())
