"""A kernel module for the compile farm that does on demand what a compiler does on bad days: BLOCK_SIZE_K says what."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from sglang_moe_ext.core import CompileJob, Failure, Resources
from sglang_moe_ext.tuning import compile as farm

FINE, REFUSED, RAISES, OUT_OF_MEMORY, EXITS, SEGFAULTS, HANGS = 16, 32, 64, 128, 256, 512, 1024
LOG = "FAKE_KERNEL_LOG"
"""The variable that names a file to which each compilation adds a byte."""


def warm_up() -> None:
    farm.TIMEOUT_S = 2  # here, in the process that workers are forked from: hangs are to end soon


def compile_job(job: CompileJob) -> Resources | Failure:
    with Path(os.environ[LOG]).open("ab") as log:
        log.write(b".")
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
    time.sleep(0.02)
    return Resources(smem_bytes=job.key.block_n, registers=job.tokens, spill_bytes=0)
