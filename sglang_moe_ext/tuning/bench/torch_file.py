"""Checks that a file of torch.save can be no bomb, before torch reads it: what it unpacks to, and what it may call."""

from __future__ import annotations

import io
import pickletools
import zipfile

_MOST_PICKLE_BYTES = 1 << 16
"""The pickle of one tensor has about 150."""
_MOST_STORAGES = 64
_ENTRY_MARK, _MOST_ENTRIES = b"PK\x01\x02", 1000
_REBUILDS = (
    "torch._utils _rebuild_",
    "torch._tensor _rebuild_",
    "torch.nested._internal.nested_tensor ",
    "torch.storage ",
    "torch.serialization _get_layout",
    "collections OrderedDict",
)
_PLAIN_TYPES = ("Storage", "Size", "device")


def check(content: bytes) -> None:
    """Raises: ValueError when loading it could take more than its size tells, or calls what no tensor does.

    torch.load(weights_only=True) runs no code of a stranger, and still unpacks what is packed, allocates storages of
    any stated size in its older format, and builds as many objects as a pickle asks for.
    """
    if content.count(_ENTRY_MARK) > _MOST_ENTRIES:
        raise ValueError("it has more parts than a tensor")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed, which torch.save never does")
            if sum(entry.file_size for entry in entries) > len(content):
                raise ValueError("its parts overlap")
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _MOST_PICKLE_BYTES:
                raise ValueError("it has no pickle of one tensor")
            _check_pickle(archive.read(pickles[0]))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"no archive of torch.save: {error}") from error


def _check_pickle(pickled: bytes) -> None:
    storages = 0
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "BINPERSID":
            storages += 1
        elif opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"its pickle has {opcode.name}, which torch.save does not write")
        elif opcode.name == "GLOBAL" and not _is_of_a_tensor(str(argument)):
            raise ValueError(f"it names {str(argument).replace(' ', '.')}")
    if storages > _MOST_STORAGES:
        raise ValueError(f"it has {storages} tensors, expected one")


def _is_of_a_tensor(name: str) -> bool:
    """`name`: module and attribute, with a space between."""
    module, _, attribute = name.partition(" ")
    return (
        name.startswith(_REBUILDS)
        or (module == "torch" and attribute.endswith(_PLAIN_TYPES))
        or (
            module == "torch"
            and attribute.islower()
            and attribute.isalnum()
            and attribute.rstrip("0123456789") in _DTYPES
        )
    )


_DTYPES = ("int", "uint", "float", "bfloat", "bool", "double", "half", "long", "short", "complex", "strided", "jagged")
