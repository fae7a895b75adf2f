"""Stands for `sglang-moe-ext tune` where there is no GPU to measure on: reads its flags, and ends as it is told.

Where it hangs, its flags are read and it ends with its server by the real command's own functions; elsewhere they are
left out, which takes less time. `$STAND_IN` is a folder: `runs` gets a line for each run, `does` says what it does,
`table` is what it writes, `place` where to.
"""

import json
import os
import sys
import time
from pathlib import Path

folder = Path(os.environ["STAND_IN"])
with open(folder / "runs", "a") as runs:
    runs.write(f"{os.getpid()} {json.dumps(sys.argv[1:])}\n")
does = (folder / "does").read_text()
if does == "hang":
    from sglang_moe_ext.cli import tune, tune_for_server

    tune_for_server.begin(tune.parser().parse_args(sys.argv[1:]))
    (folder / "hangs").touch()
    time.sleep(600)
if does == "fail":
    print(json.dumps({"error": "no GPU answers"}))
    sys.exit(1)
if does == "one of two fails":
    print(json.dumps({"layers": [{"written": [__file__], "entries": 2}, {"error": "no time was left"}]}))
    sys.exit(1)
if does == "crash":
    os.abort()
if does == "needless":
    print(json.dumps({"needless": "it is known"}))
    sys.exit(0)
time.sleep(0.2)
place = Path((folder / "place").read_text())
place.parent.mkdir(parents=True, exist_ok=True)
place.write_text((folder / "table").read_text())
print(json.dumps({"written": [str(place)], "entries": 2}))
