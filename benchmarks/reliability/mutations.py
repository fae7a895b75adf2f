"""Random damage to JSON documents and to bytes, the same for the same seed."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 8, 16, 64, 127, 128, 256, 1024, 4096, 2**31, 2**63, -(2**64), 10**30),
    *(0.5, 64.0, -0.0, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "64", "null", "x" * 5000, "\x1b[31mred", "a\nb\r\nc", "\u202e\u0000", "../../etc/passwd", "\ud800"),
    *([], {}, [64], [[[]]], {"": {}}, [1] * 1000, {"BLOCK_SIZE_M": {}}),
)
ODD_KEYS = (
    *("", "0", "-1", "64", "1e3", " 64", "64.0", "M", "triton_version", "\x1b[2J", "a\nb", "9" * 40, "k" * 100_000),
    *("BLOCK_SIZE_M", "BLOCK_SIZE_K", "num_stages", "num_warps", "USE_TMA", "SPLIT_K", "waves_per_eu", "maxnreg"),
)


def mutate_json(document: Any, chance: random.Random) -> Any:
    """A copy with a value or a key, or a few, replaced, added or taken out anywhere in it."""
    changed = json.loads(json.dumps(document))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        changed = _change_one(changed, chance)
    return changed


def _change_one(document: Any, chance: random.Random) -> Any:
    if isinstance(document, (dict, list)) and document and chance.random() < 0.95:
        keys = list(document) if isinstance(document, dict) else range(len(document))
        key = chance.choice(list(keys))
        match chance.randrange(6):
            case 0 if isinstance(document, dict):
                document[chance.choice(ODD_KEYS)] = document.pop(key)
            case 1 if isinstance(document, dict):
                document[chance.choice(ODD_KEYS)] = _odd_value(chance)
            case 2:
                del document[key]
            case _:
                document[key] = _change_one(document[key], chance)
        return document
    return _odd_value(chance)


def _odd_value(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(ODD_VALUES))


def text_of(document: Any, chance: random.Random) -> bytes:
    """The document as a file may hold it: whole for the most part, or cut, with bytes changed, or with a BOM."""
    text = json.dumps(document, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    return text if chance.random() < 0.85 else damage(text, chance)


def damage(content: bytes, chance: random.Random) -> bytes:
    """Bytes cut short, changed, repeated, or with others before them."""
    match chance.randrange(5):
        case 0:
            return content[: chance.randint(0, len(content))]
        case 1:
            changed = bytearray(content)
            for _ in range(chance.randint(1, 8)):
                if changed:
                    changed[chance.randrange(len(changed))] = chance.randrange(256)
            return bytes(changed)
        case 2:
            place = chance.randint(0, len(content))
            return content[:place] + chance.randbytes(chance.randint(1, 16)) + content[place:]
        case 3:
            return content + content
        case _:
            return chance.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0")) + content
