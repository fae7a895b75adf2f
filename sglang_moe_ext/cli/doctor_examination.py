"""What `doctor` found out about one layer in one engine: the value that both renderers read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sglang_moe_ext.cli.doctor_layers import LayerUnderTest
from sglang_moe_ext.engines.backend_answer import AskedBackend


@dataclass(frozen=True, slots=True)
class Finding:
    """The configuration that one GEMM takes at one number of tokens, and why; `both` where one serves both GEMMs."""

    tokens: int
    gemm: Literal["up", "down", "both"]
    config: str
    why: str


@dataclass(frozen=True, slots=True)
class Examination:
    """One layer in one engine.

    `plugin`: whether the plugin is active in servers of this environment; `no_table`: why a server does not, or may
    not, read a table at all; `backend`: what the engine said that it runs the layer by, None where it was not asked;
    `problems`: what is wrong with tables that are present, a line each.
    """

    layer: LayerUnderTest
    engine: str
    engine_version: str
    triton: str
    plugin: str | None
    no_table: str | None
    is_deterministic: bool
    files: tuple[Path, ...]
    findings: tuple[Finding, ...]
    problems: tuple[str, ...] = ()
    backend: AskedBackend | None = None

    @property
    def reads_tables(self) -> bool:
        return self.no_table is None and not self.is_deterministic
