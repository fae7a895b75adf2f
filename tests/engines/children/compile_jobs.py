"""Child of the tests that compile: makes the binaries that stdin asks for with the kernel of the SGLang on PYTHONPATH.

stdin: [<CompileJob as a dict>]. Last line of stdout: [{"smem", "registers", "spill"} or {"failure", "message"}].
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

from sglang_moe_ext.core import CompileJob, CompileKey, Failure, MoEShape, Quantization, Resources, Target
from sglang_moe_ext.engines.sglang import compile as sglang_compile


def parsed(document: dict[str, Any]) -> CompileJob:
    shape = document["shape"]
    quantization = shape["quantization"]
    block = quantization["block_shape"]
    return CompileJob(
        **document
        | {
            "shape": MoEShape(
                **shape
                | {
                    "quantization": Quantization(
                        **quantization | {"block_shape": None if block is None else tuple(block)}
                    )
                }
            ),
            "key": CompileKey(**document["key"]),
            "target": Target(**document["target"]),
        }
    )


def said(result: Resources | Failure) -> dict[str, Any]:
    match result:
        case Resources():
            return {"smem": result.smem_bytes, "registers": result.registers, "spill": result.spill_bytes}
        case Failure():
            return {"failure": result.kind, "message": result.message}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        print(json.dumps([said(sglang_compile.compile_job(parsed(document))) for document in json.load(sys.stdin)]))
