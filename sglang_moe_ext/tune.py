"""`python -m sglang_moe_ext.tune`: the same command as `sglang-moe-ext tune`."""

import sys
from collections.abc import Sequence

from sglang_moe_ext.cli import main as command_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sglang-moe-ext tune` with these arguments, by default those of this process; gives its exit status."""
    return command_line.main(["tune", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
