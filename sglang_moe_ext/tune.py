"""`python -m sglang_moe_ext.tune`: the `tune` command."""

import sys

from sglang_moe_ext.cli.tune import main

if __name__ == "__main__":
    sys.exit(main())
