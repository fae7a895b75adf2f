"""Tables of `kernels.grouped_gemm`: the name of the file, where it lies in the user's store, and its entries."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sglang_moe_ext.core import Table, TableError
from sglang_moe_ext.tables import config_table, user_store
from sglang_moe_ext.untrusted import show

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GroupedGemmKey:
    """What the name of a table says: the reduction length, the dtype or scheme, and (N, K) of a block of scales."""

    hidden_size: int
    dtype: str
    block_shape: tuple[int, int] | None = None

    @property
    def file_name(self) -> str:
        """As SGLang's former tuning script named it: `grouped_gemm_config_4096_fp8_w8a8_block128x128.json`."""
        block = "" if self.block_shape is None else f"_block{self.block_shape[0]}x{self.block_shape[1]}"
        return f"grouped_gemm_config_{self.hidden_size}_{self.dtype}{block}.json"


def folder(store: Path, device_name: str, triton: str) -> Path:
    """Where the tables for that GPU and that Triton lie, since their names say neither."""
    return (
        store / "grouped_gemm" / device_name.replace(" ", "_").replace("/", "_") / f"triton_{triton.replace('.', '_')}"
    )


def load(key: GroupedGemmKey, device_name: str, triton: str) -> Table:
    """The entries for that GPU, by the number of rows of `a`; none where there is no table. A file is read once."""
    store = user_store.root_if_any()
    return {} if store is None else _read(folder(store, device_name, triton) / key.file_name)


def forget() -> None:
    """Read each file again when it is next asked for."""
    _read.cache_clear()


@lru_cache
def _read(path: Path) -> Table:
    if not path.exists():
        return {}
    try:
        return config_table.read(path)
    except TableError as error:
        log.warning("%s: the default configurations of grouped_gemm run instead", show(error))
        return {}
