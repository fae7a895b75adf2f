"""A bench for the measuring process that does on demand what a GPU does on bad days: the number of tokens says what.

It stands for a GPU, which is not here: what hangs, dies or ends CUDA there does so here.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_moe_ext.tuning.questions import Answer, Check, Checked, Question, Race, Raced, Screen, Screened

FINE, RAISES, HANGS, EXITS, SEGFAULTS, STICKY, OUT_OF_MEMORY = range(1, 8)


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


class FakeBench:
    device_name = "NVIDIA H200"

    def answer(self, question: Question) -> Answer:
        match question.tokens:
            case 2:
                raise ValueError("refused\nwith a second line")
            case 3:
                time.sleep(600)
            case 4:
                os._exit(7)
            case 5:
                os.kill(os.getpid(), signal.SIGSEGV)
            case 6:
                raise torch.AcceleratorError("an illegal memory access was encountered")
            case 7:
                raise torch.cuda.OutOfMemoryError("no memory")
        match question:
            case Screen():
                return Screened(tuple((float(group),) * question.samples for group in question.groups))
            case Race():
                return Raced(tuple((10.0,) * question.rounds for _ in question.pairs), 4)
            case Check():
                return Checked(1e-3)
