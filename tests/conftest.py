"""What all tests share: how hypothesis draws examples.

`./check` draws the same examples each time, so that a fresh clone never fails by chance; `./check --fuzz` draws others.
"""

import os

from hypothesis import settings

settings.register_profile("check", deadline=None, derandomize=True, database=None)
settings.register_profile("fuzz", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "check"))
