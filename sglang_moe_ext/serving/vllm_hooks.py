"""What our hooks put into vLLM: tables and what asks for them, launchers that fit, and one line on what it runs."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_moe_ext import __version__, env, package_data
from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.engines import config_dict, launch_rules, launch_shape, running_engine
from sglang_moe_ext.engines.config_dict import ConfigDict
from sglang_moe_ext.engines.vllm import hook_points, launch_args, support
from sglang_moe_ext.engines.vllm.hook_points import VllmHookPoints
from sglang_moe_ext.engines.vllm.installation import VllmInstallation
from sglang_moe_ext.engines.vllm.table_names import NAMING
from sglang_moe_ext.serving import launch_guard, vllm_experts_hook, vllm_lookup_hook
from sglang_moe_ext.serving.guard import ConfigGuard, RefusedEntry, SafeEntry, warn_once
from sglang_moe_ext.serving.kernel_selection import KernelPlans
from sglang_moe_ext.serving.launch_guard import GuardedLauncher
from sglang_moe_ext.serving.table_search import TableDir
from sglang_moe_ext.serving.vllm_lookup_hook import VllmTableResolver
from sglang_moe_ext.tables import user_store


def table_dirs(engine: VllmInstallation) -> list[TableDir]:
    """In order of search. SGLang's tables are not searched: `export` converts them into tables for vLLM.

    The engine's variable is read and never set, since a value of it has LoRA layers ask for other tables.
    """
    named, own = os.environ.get(env.VLLM_CONFIG_FOLDER), user_store.root_if_any()
    tuned = package_data.folder("tuned_configs")
    return [
        *([] if named is None else [_flat("your", Path(named), is_asked_for=True)]),
        *([] if own is None else [TableDir("your", own / "tables" / "vllm", dialect=NAMING)]),
        *([] if tuned is None else [TableDir("the shipped", tuned / "vllm", dialect=NAMING)]),
        _flat("the engine's", engine.configs_folder),
    ]


def _flat(name: str, root: Path, *, is_asked_for: bool = False) -> TableDir:
    return TableDir(name, root, is_engines=True, is_asked_for=is_asked_for, is_flat=True, dialect=NAMING)


log = logging.getLogger(__name__)

_OURS, _THEIRS = "sglang_moe_ext", "vllm"


def excludes_plugin(wanted: str | None, name: str) -> bool:
    """Whether that value of the engine's variable leaves out the plugin of that name, read as the engine reads it."""
    return wanted is not None and name not in wanted.split(",")


def install_hooks(layer: ModuleType, way: str) -> VllmTableResolver:
    """Replace the engine's functions, all or none.

    Raises:
        EngineError: something of the engine is not as it was.
    """
    engine = hook_points.locate(layer)
    line = ActivityLine(engine, way)
    resolver = VllmTableResolver(engine, lambda: table_dirs(engine.engine), line.looked_up)
    replaced = [
        (engine.lookup, vllm_lookup_hook.lookup_hook(engine, resolver)),
        (engine.table, vllm_lookup_hook.table_hook(engine, resolver)),
    ]
    launchers = (engine.launch, engine.launch_groups)
    replaced += [(function, launch_guard.launch_hook(_launcher(engine, function))) for function in launchers]
    built = _building(engine.building, line)
    for original, ours in replaced:
        running_engine.replace(_THEIRS, original, ours)
    type.__setattr__(engine.kernel, "__init__", built)
    vllm_experts_hook.install(engine, KernelPlans(engine, lambda: table_dirs(engine.engine), resolver.tables))
    log_through_engine()
    return resolver


def _launcher(engine: VllmHookPoints, function: Callable[..., Any]) -> GuardedLauncher:
    signature = inspect.signature(function)

    def fitted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConfigDict | None:
        """A launch tells int8 from bf16, which a call of the lookup does not."""
        arguments = signature.bind(*args, **kwargs).arguments
        entry, device_name = arguments["config"], engine.device_name()
        if device_name is None or "BLOCK_SIZE_N" not in entry:
            return None
        guard = ConfigGuard(engine.engine.version, running_engine.running_gpu(device_name), "vllm")
        runs = fit_launch(guard, entry, launch_shape.shape_of(arguments))
        return None if runs.why is None else runs.entry

    return GuardedLauncher(function, hook_points.CONFIG_POSITION, engine.override, fitted)


def fit_launch(guard: ConfigGuard, entry: ConfigDict, shape: MoEShape) -> SafeEntry:
    """The entry as it may be launched. Tokens are sorted already, so its BLOCK_SIZE_M stays."""
    clamped = launch_args.clamp_to_block(entry, shape)
    match guard.check(clamped, shape, "up"):
        case SafeEntry() as safe:
            return safe
        case RefusedEntry(why):
            plain = launch_rules.plain_tile(entry["BLOCK_SIZE_M"], shape)
            return SafeEntry(config_dict.resize(clamped, plain), f"refused: {why}: {plain} runs")


class ActivityLine:
    """What a log says once for each kind of experts: who is active, with which tables, and whether those matter."""

    def __init__(self, engine: VllmHookPoints, way: str) -> None:
        self._engine, self._way = engine, way
        self._said: set[str] = set()

    def looked_up(self) -> None:
        """A layer asks for a table, of which experts have said nothing: some are built in other ways."""
        if not self._said:
            self._say("a layer asks for a table")

    def built(self, runs: object) -> None:
        """Those experts run a layer from now on."""
        reads = (
            "uses Triton config tables"
            if support.read_tables(runs)
            else "does not use Triton config tables; tuning has no effect"
        )
        self._say(f"{type(runs).__name__} {reads}")

    def _say(self, what: str) -> None:
        if what in self._said:
            return
        self._said.add(what)
        release = self._engine.engine
        folders = ", ".join(str(table_dir.root) for table_dir in table_dirs(release) if os.path.isdir(table_dir.root))
        active = f"{__version__} is active in vLLM {release.version_text}, by {self._way}"
        log.info("sglang-moe-ext %s, with the tables in %s: %s", active, folders, what)


def _building(original: Callable[..., None], line: ActivityLine) -> Callable[..., None]:
    """In the place of the engine's `__init__` of what a layer's experts are put into."""

    @functools.wraps(original)
    def building(self: object, prepare_finalize: Any, fused_experts: Any, *args: Any, **kwargs: Any) -> None:
        original(self, prepare_finalize, fused_experts, *args, **kwargs)
        try:
            line.built(fused_experts)
        except Exception as error:  # the layer is built, whatever we make of it
            warn_once(f"nothing is known of {type(fused_experts).__name__}: {type(error).__name__}: {error}")

    return building


def log_through_engine() -> None:
    """Log through vLLM's logger: it alone has a handler, in some releases only later."""
    ours = logging.getLogger(_OURS)
    if not ours.handlers:
        ours.parent = logging.getLogger(_THEIRS)
