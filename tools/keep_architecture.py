"""Leave, in a CUDA library, only the machine code for one architecture, so that it packs small; zeros fill its place.

Usage: python tools/keep_architecture.py LIBRARY SM. Kernels that it has as PTX alone, or for other GPUs alone, are
gone. Layout as CUDA 13 writes it: containers, each with a header and entries one behind the other, each of which has
kind, sizes and architecture in a header of its own.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

_CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of the entries
_ENTRY = struct.Struct("<HHIQIIHHI")  # kind, -, bytes of this header, bytes of the code, four more, architecture
_MAGIC, _VERSION = 0xBA55ED50, 1
_START = struct.pack("<IHH", _MAGIC, _VERSION, _CONTAINER.size)
_MACHINE_CODE = 2


def containers(library: bytes) -> Iterator[slice]:
    """Where the entries of each container lie."""
    at = library.find(_START)
    while at >= 0:
        *_, entry_bytes = _CONTAINER.unpack_from(library, at)
        entries = slice(at + _CONTAINER.size, at + _CONTAINER.size + entry_bytes)
        yield entries
        at = library.find(_START, entries.stop)


def machine_code(entries: bytes, sm: int) -> bytes:
    """The entries with machine code for that architecture."""
    found, at = b"", 0
    while at < len(entries):
        kind, _, header_bytes, code_bytes, *_, of = _ENTRY.unpack_from(entries, at)
        end = at + header_bytes + code_bytes
        if (kind, of) == (_MACHINE_CODE, sm):
            found += entries[at:end]
        at = end
    return found


def main() -> None:
    path, sm = Path(sys.argv[1]), int(sys.argv[2])
    library, kept_bytes = bytearray(path.read_bytes()), 0
    for entries in list(containers(bytes(library))):
        kept = machine_code(bytes(library[entries]), sm)
        kept_bytes += len(kept)
        library[entries] = kept.ljust(entries.stop - entries.start, b"\0")
        _CONTAINER.pack_into(library, entries.start - _CONTAINER.size, _MAGIC, _VERSION, _CONTAINER.size, len(kept))
    if not kept_bytes:
        sys.exit(f"{path} has no machine code for sm_{sm}: left as it was")
    path.write_bytes(library)
    print(f"{path.name}: {kept_bytes} B for sm_{sm} are left")


if __name__ == "__main__":
    main()
