"""Run a command as a process group that ends with the process that started it, and at the latest after its time.

usage: python -m sglang_moe_ext.e2e.supervised PARENT SECONDS COMMAND ...
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from sglang_moe_ext.engines.end_with_parent import end_with_parent


def main(words: Sequence[str]) -> int:
    """The command's exit status; `words`: the parent's id, the seconds, the command."""
    parent, seconds, *command = words
    end_with_parent(int(parent))
    limit = threading.Timer(float(seconds), os.killpg, [0, signal.SIGKILL])
    limit.daemon = True
    limit.start()
    return subprocess.call(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
