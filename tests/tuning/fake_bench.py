"""A bench for the measuring process that does on demand what a GPU does on bad days: the number of tokens says what.

It stands for a GPU, which is not here: what hangs, dies or ends CUDA there does so here.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
)

FINE, RAISES, HANGS, EXITS, SEGFAULTS, STICKY, OUT_OF_MEMORY, POISONS, WARNS = range(1, 10)


@dataclass(frozen=True, slots=True)
class MakeBench:
    """`log`: a byte for each start goes there; the first `failing_starts` of them die."""

    log: Path
    failing_starts: int = 0
    error: str = ""

    def __call__(self) -> FakeBench:
        with self.log.open("ab") as log:
            log.write(b".")
        if self.log.stat().st_size <= self.failing_starts:
            os._exit(3)
        if self.error:
            raise RuntimeError(self.error)
        return FakeBench()


def accelerator_error(message: str) -> RuntimeError:
    """torch's. Imported here, since most of these processes end without a need for it."""
    import torch

    return torch.AcceleratorError(message)


class FakeBench:
    device_name = "NVIDIA H200"
    _is_poisoned = False

    def is_well(self) -> bool:
        return not self._is_poisoned

    def measure(self, request: BenchRequest) -> BenchResult:
        if self._is_poisoned:
            raise accelerator_error("an earlier kernel's illegal memory access")
        match request.tokens:
            case 2:
                raise ValueError("refused\nwith a second line")
            case 3:
                time.sleep(600)
            case 4:
                os._exit(7)
            case 5:
                os.kill(os.getpid(), signal.SIGSEGV)
            case 6:
                raise accelerator_error("an illegal memory access was encountered")
            case 7:
                import torch

                raise torch.cuda.OutOfMemoryError("no memory")
            case 8:
                self._is_poisoned = True
                raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
            case 9:
                for name in ("sglang_moe_ext.tuning", "an_engine"):
                    logging.getLogger(name).warning("%s warns", name)
                    logging.getLogger(name).info("%s chats", name)
        match request:
            case BenchGemm():
                return GemmTimes(tuple((float(group),) * request.samples for group in request.groups))
            case BenchLayers():
                return LayerTimes(tuple((10.0,) * request.rounds for _ in request.pairs), 4)
            case CheckAccuracy():
                return Accuracy(1e-3)
