"""Child of test_capture: captures into the folder of its first argument, on a slow disk, until it is killed."""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sglang_moe_ext.engines.sglang.routing_hook import RoutingBatch
from sglang_moe_ext.serving.capture import CaptureRequest, Recorder

_PIECES = 20
_PAUSE_S = 0.01


class SlowFile(io.FileIO):
    """What is written takes its time: a kill meets a file of which a part is on the disk."""

    def write(self, content: Any) -> int:
        step = len(content) // _PIECES + 1
        for start in range(0, len(content), step):
            time.sleep(_PAUSE_S)
            super().write(content[start : start + step])
        return len(content)


if __name__ == "__main__":
    os.fdopen = lambda descriptor, mode: SlowFile(descriptor, mode)  # type: ignore[assignment, misc]  # noqa: PLW0108
    recorder = Recorder(CaptureRequest(Path(sys.argv[1]), max_files=10_000))
    while True:
        recorder.take(RoutingBatch(0, torch.rand(2_000, 16).topk(2, dim=1).indices.int(), None))
        time.sleep(_PAUSE_S)
