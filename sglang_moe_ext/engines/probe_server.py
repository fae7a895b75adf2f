"""The process of a probe: it imports the engine once, and answers each request in a fork that has looked nothing up.

Arguments: the probe's module, whose `main` reads one request from stdin; the pid of the process that asks; the
descriptor on which each fork's exit code is told, a line each; the module's own arguments.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback

from sglang_moe_ext.engines.end_with_parent import end_with_parent


class ForkedRequests:
    """The stdin of a probe's module: `read` returns in a fork of the process, one for each line of the real stdin.

    A process whose forks cannot use CUDA answers one request itself, and ends.
    """

    def __init__(self, parent: int, told: int) -> None:
        self._parent, self._told, self._lines = parent, told, sys.stdin

    def read(self) -> str:
        can_fork = _forks_can_use_cuda()  # the engine is imported, and nothing else happens here
        while line := self._lines.readline():
            sys.stdout.flush()
            if not can_fork:
                return line
            pid = os.fork()
            if not pid:
                end_with_parent(self._parent)
                return line
            _, status = os.waitpid(pid, 0)
            os.write(self._told, f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)


def _forks_can_use_cuda() -> bool:
    """Not after CUDA was initialized, nor after as little as its devices were counted, which torch says in forks alone.

    vLLM counts them when it is imported where no NVML can be asked.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return True
    if torch.cuda.is_initialized():
        return False
    pid = os.fork()
    if not pid:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == 0


def main() -> None:
    module, parent, told = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    end_with_parent(parent)
    sys.stdin = ForkedRequests(parent, told)
    sys.argv = [module, *sys.argv[4:]]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the parent reads the last line, as of any Python process
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what the engine registered to run at exit belongs to the process that imported it


if __name__ == "__main__":
    main()
