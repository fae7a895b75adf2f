"""Which MoE backend an engine said it runs a layer by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AskedBackend:
    """The MoE backend that an engine said it runs a layer by, in the engine's spelling, and its class that chose it."""

    name: str
    method: str

    @property
    def reads_tables(self) -> bool:
        """Triton's is the one that does, in both engines."""
        return self.name.lower() in ("triton", "batched_triton", "batched triton")
