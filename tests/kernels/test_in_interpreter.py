"""Runs tests/kernels/interpreted in a child process: Triton decides at import whether it interprets or compiles."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_the_kernel_is_right_in_tritons_interpreter(tmp_path: Path) -> None:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTEST_ADDOPTS": "",
    }
    command = [sys.executable, "-m", "pytest", str(HERE / "interpreted"), "-q", "-p", "no:cacheprovider", "--no-header"]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert child.returncode == 0, f"{' '.join(command)}\n{child.stdout[-8000:]}\n{child.stderr[-2000:]}"
    assert " skipped" not in child.stdout, child.stdout[-2000:]
