"""Collected only under TRITON_INTERPRET=1, which test_in_interpreter.py sets in a child process."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import repair
    from quick_interpreter import quicken

    repair()
    quicken()
else:
    collect_ignore_glob = ["test_*.py"]
