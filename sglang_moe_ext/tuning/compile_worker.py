"""Imported by the process that compile workers are forked from: brings the kernel to life there, once."""

import importlib
import os

if _module := os.environ.get("SGLANG_MOE_EXT_PRELOAD"):
    importlib.import_module(_module).warm_up()
