"""Ask the vLLM of this environment which configurations a layer takes, and explain its answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sglang_moe_ext.cli.doctor_examination import Examination, Finding
from sglang_moe_ext.cli.doctor_layers import LayerUnderTest
from sglang_moe_ext.core import TableError
from sglang_moe_ext.engines.installed_engines import parse_version
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.engines.vllm import lookup_probe, support, table_names
from sglang_moe_ext.tables import config_table, provenance


def examine(layer: LayerUnderTest, tokens: Sequence[int], *, deterministic: bool) -> Examination:
    """What a server of this environment takes for the layer.

    Raises:
        EngineError: vLLM could not be asked.
    """
    request = LookupRequest(layer.shape, tokens, layer.pretended_gpu, deterministic, "auto", layer.architecture)
    answer = lookup_probe.AS_SERVED.ask(request)
    whys = {m: answer.whys.get(m) or _why(layer, answer, m, deterministic) for m in answer.up}
    return Examination(
        layer=layer,
        engine="vLLM",
        engine_version=answer.engine_version,
        triton=answer.triton,
        plugin=answer.plugin,
        no_table=support.why_no_table(
            layer.shape, layer.gpu, layer.architecture, parse_version(answer.engine_version), answer.backend
        ),
        backend=answer.backend,
        is_deterministic=deterministic,
        files=answer.files,
        findings=tuple(
            Finding(m, "both", str(config), _with_change(whys[m], answer, m)) for m, config in answer.up.items()
        ),
        problems=answer.remarks,
    )


def _why(layer: LayerUnderTest, answer: LookupResult, tokens: int, deterministic: bool) -> str:
    """Why vLLM takes what is its own choice."""
    if deterministic:
        return "the engine's default: batch invariance reads no table"
    name = table_names.file_name(table_names.table_key(layer.shape, layer.gpu.device_name))
    file = next((file for file in answer.files if file.name == name and _is_engines(file, answer)), None)
    if file is None:
        return f"the engine's default: no table {name}"
    try:
        nearest = config_table.nearest(config_table.read(file), tokens)
    except TableError:
        return f"of {file.name}, which has more than this package can read"
    entry = "its own entry" if nearest == tokens else f"nearest entry {nearest}"
    known = provenance.read(file)
    return f"{entry}; {(known and known.origin(nearest)) or 'origin unknown: shipped with the engine, or yours'}"


def _with_change(why: str, answer: LookupResult, tokens: int) -> str:
    """The reason, with what the plugin changes of the entry before its launch, where it changes something."""
    change = answer.fitted.get(tokens, {}).get("up")
    return why if change is None else f"{why}; {change}"


def _is_engines(file: Path, answer: LookupResult) -> bool:
    """Whether the engine's own lookup opened the file, which its log then names."""
    return any(str(file) in line for line in answer.log)
