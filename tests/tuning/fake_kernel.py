"""A kernel module for the compile pool that does on demand what a compiler does on bad days: BLOCK_SIZE_K says what.

What it does on import, and where it leaves its traces, stands in the environment.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from sglang_moe_ext.core import CompileJob, Failure, MoEExtError, Resources

FINE, REFUSED, RAISES, OUT_OF_MEMORY, EXITS, SEGFAULTS, HANGS, RUNS_ASSEMBLER, WAITS = (16 << bit for bit in range(9))
LOG = "FAKE_KERNEL_LOG"
"""The variable that names a file to which each compilation adds a line: its BLOCK_SIZE_N and the process."""
ON_IMPORT = "FAKE_KERNEL_ON_IMPORT"
"""The variable that says "raises", "refuses", "exits" or "hangs"."""


def warm_up() -> None:
    match os.environ.get(ON_IMPORT):
        case "raises":
            raise RuntimeError("no operators for this machine")
        case "refuses":
            raise MoEExtError("this engine is not supported")
        case "exits":
            os._exit(3)
        case "hangs":
            time.sleep(600)


def compile_job(job: CompileJob) -> Resources | Failure:
    log = Path(os.environ[LOG])
    with log.open("a") as file:
        file.write(f"{job.key.block_n} {os.getpid()}\n")
    match job.key.block_k:
        case 32:
            return Failure("CompilationError", "refused")
        case 64:
            raise RuntimeError("cuobjdump said nothing of registers")
        case 128:
            raise MemoryError("out of memory")
        case 256:
            os._exit(1)
        case 512:
            os.kill(os.getpid(), signal.SIGSEGV)
        case 1024:
            time.sleep(600)
        case 2048:
            subprocess.run(["sleep", "600"], check=True)
        case 4096:
            while not log.with_suffix(".go").exists():
                time.sleep(0.01)
    return Resources(smem_bytes=job.key.block_n, registers=job.tokens, spill_bytes=0)
