"""Ask the SGLang of this environment which configurations a layer takes, and explain its answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sglang_moe_ext.cli.doctor_examination import Examination, Finding
from sglang_moe_ext.cli.doctor_layers import LayerUnderTest
from sglang_moe_ext.core import Projection, TableError, TableKey
from sglang_moe_ext.engines.installed_engines import parse_version
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.engines.sglang import lookup_probe, support, table_names
from sglang_moe_ext.tables import config_table, provenance


def examine(layer: LayerUnderTest, tokens: Sequence[int], backend: str, *, deterministic: bool) -> Examination:
    """What a server of this environment takes for the layer; `backend` as its --moe-runner-backend.

    Raises:
        EngineError: SGLang could not be asked.
    """
    request = LookupRequest(layer.shape, tokens, layer.pretended_gpu, deterministic, backend, layer.architecture)
    answer = lookup_probe.AS_SERVED.ask(request)
    return Examination(
        layer=layer,
        engine="SGLang",
        engine_version=answer.engine_version,
        triton=answer.triton,
        plugin=answer.plugin,
        no_table=support.why_no_table(
            backend, layer.shape, layer.gpu, layer.architecture, parse_version(answer.engine_version), answer.backend
        ),
        backend=answer.backend,
        is_deterministic=deterministic,
        files=answer.files,
        findings=tuple(explain(layer, answer, deterministic=deterministic)),
        problems=answer.remarks,
    )


def explain(layer: LayerUnderTest, answer: LookupResult, *, deterministic: bool) -> list[Finding]:
    """What the answer means, for both GEMMs at each number of tokens."""
    device = layer.gpu.device_name
    files = {file.name: file for file in answer.files}
    up_key = table_names.table_key(layer.shape, device)
    down_key = table_names.table_key(layer.shape, device, down=True)
    up_file, down_file = (files.get(table_names.file_name(key)) for key in (up_key, down_key))
    found: list[Finding] = []
    for m, config in answer.up.items():
        ours = answer.whys.get(m)
        why = ours or _why(up_file, up_key, m, answer.triton, deterministic)
        found.append(Finding(m, "up", str(config), _with_change(why, answer, m, "up")))
        down = answer.down[m]
        if down is None or (down_file is None and ours is None):
            found.append(Finding(m, "down", str(down or config), "as the up projection: no table of its own"))
        else:
            why = ours or _why(down_file, down_key, m, answer.triton, deterministic)
            found.append(Finding(m, "down", str(down), _with_change(why, answer, m, "down")))
        if m in answer.paths:
            found.append(Finding(m, "both", answer.paths[m], "our own kernels, measured faster than those above"))
    return found


def _why(file: Path | None, key: TableKey, tokens: int, triton: str, deterministic: bool) -> str:
    """Why SGLang takes what it takes, from the file that it opened for the key."""
    if deterministic:
        return "the engine's default: deterministic inference reads no table"
    if file is None:
        return f"the engine's default: no table {table_names.file_name(key)}"
    nearest = _nearest(file, tokens)
    if nearest is None:
        return f"of {file.name}, which has more than this package can read"
    entry = "its own entry" if nearest == tokens else f"nearest entry {nearest}"
    folder = file.parent.name
    if folder == table_names.version_folder(triton):
        made_for = "exact Triton"
    else:
        made_for = f"other Triton ({folder.removeprefix('triton_').replace('_', '.')}), running {triton}"
    return f"{entry}; {made_for}; {_origin(file, nearest)}"


def _with_change(why: str, answer: LookupResult, tokens: int, projection: Projection) -> str:
    """The reason, with what the plugin changed of the entry before its launch, where it changed something."""
    change = answer.fitted.get(tokens, {}).get(projection)
    return why if change is None else f"{why}; {change}"


def _nearest(file: Path, tokens: int) -> int | None:
    """The entry that the engine takes, None where the file has what this package does not read."""
    try:
        return config_table.nearest(config_table.read(file), tokens)
    except TableError:
        return None


def _origin(file: Path, tokens: int) -> str:
    known = provenance.read(file)
    if known is None:
        return "origin unknown: shipped with the engine, or a user's"
    return known.origin(tokens) or "origin unknown"
