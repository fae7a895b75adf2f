"""Progress of a loop, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any


def tqdm(iterable: Iterable[Any], **options: Any) -> Iterable[Any]:
    """The same elements; `options` as the real one takes them, such as `desc` and `total`."""
    import tqdm as real  # type: ignore[import-untyped]

    progress: Iterable[Any] = real.tqdm(iterable, file=sys.stderr, **options)
    return progress
