"""`python -m sglang_moe_ext.export`: the `export` command."""

import sys

from sglang_moe_ext.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
