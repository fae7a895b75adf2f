"""How many examples a property test draws: as stated, or 20 times as many under `./check --fuzz`."""

import os

FUZZ = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"


def examples(count: int) -> int:
    """The value of `max_examples` for a test that states its own."""
    return count * (20 if FUZZ else 1)
