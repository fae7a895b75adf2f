"""What compiling is about: whose kernel, what became of each job, how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sglang_moe_ext.core import CompileJob, Failure, Resources

Compiled = dict[CompileJob, Resources | Failure]
Progress = Callable[[int, int], None]
"""Called with how many binaries are done, of how many wanted so far; from the farm's own thread."""


@dataclass(frozen=True, slots=True)
class KernelSource:
    """Whose kernel it is. `module` has `warm_up()` and `compile_job(job)`; `fingerprint` changes with the kernel."""

    name: str
    module: str
    fingerprint: str
    is_engines_own: bool
