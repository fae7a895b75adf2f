"""Where vLLM lies, which version it is, and the folder of the tables it ships; imports nothing of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines import installed_engines

OLDEST = (0, 20, 0)
"""The oldest release whose layout is known."""
LAYER_MODULE = "vllm.model_executor.layers.fused_moe.fused_moe"
"""The lookup, the kernel and what launches it, in all releases from 0.20 to 0.33."""


"""Names one flat folder of tables, which comes before those that it ships; LoRA layers ask for other tables then."""


@dataclass(frozen=True, slots=True)
class VllmInstallation:
    """One vLLM. `root` is the folder of its package; `triton` the Triton it will run with, if there is one."""

    version_text: str
    root: Path
    triton: str | None

    @property
    def version(self) -> tuple[int, int, int]:
        return installed_engines.parse_version(self.version_text)

    @property
    def configs_folder(self) -> Path:
        """The tables themselves lie there, whatever Triton they were made with."""
        return self.root.parent / Path(*LAYER_MODULE.split(".")[:-1]) / "configs"


def find() -> VllmInstallation | None:
    """The vLLM that `import vllm` would load here, or None.

    Raises:
        EngineError: it is older than anything we know.
    """
    found = installed_engines.find_distribution("vllm")
    if found is None:
        return None
    version_text, root = found
    if installed_engines.parse_version(version_text) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise EngineError(f"vLLM {version_text} at {root} is too old: expected {oldest} or newer")
    return VllmInstallation(version_text, root, installed_engines.running_triton())
