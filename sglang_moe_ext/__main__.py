"""`python -m sglang_moe_ext`: the same command line as `sglang-moe-ext`."""

import sys

from sglang_moe_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
