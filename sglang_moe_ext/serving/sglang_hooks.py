"""What our hooks put into SGLang: the answer to a layer's call, a launcher that fits, and the capture of routing."""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_moe_ext import __version__, env, package_data
from sglang_moe_ext.core import EngineError, MoEShape
from sglang_moe_ext.engines import running_engine
from sglang_moe_ext.engines.sglang import hook_points, kernel_sequence, table_names
from sglang_moe_ext.engines.sglang import kernel_sequence as known_sequence
from sglang_moe_ext.engines.sglang.deferred_sort import DeferredSort, NextSort, is_put_off, sort_now
from sglang_moe_ext.engines.sglang.hook_points import SglangHookPoints
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.kernel_plans import Plan
from sglang_moe_ext.serving import launch_guard, sglang_lookup_hook
from sglang_moe_ext.serving.guard import warn_once
from sglang_moe_ext.serving.kernel_selection import ColdPlans
from sglang_moe_ext.serving.launch_guard import GuardedLauncher
from sglang_moe_ext.serving.table_search import TableDir
from sglang_moe_ext.tables import user_store
from sglang_moe_ext.untrusted import show

Declines = Callable[[tuple[int, ...], tuple[int, ...]], None]
"""What hears of the weights, [experts, ...] of both GEMMs, for which our kernels is not to be chosen again."""


_OUT_OF_MEMORY = "OutOfMemoryError"
"""Torch's, which says something of this moment, and nothing of the layer."""


def sequence_hook(
    engine: SglangHookPoints, original: Callable[..., Any], decline: Declines, cold: ColdPlans
) -> Callable[..., Any]:
    """A function to stand where `engine.sequence` stood.

    Where the sort was put off, it runs before the engine's kernels do, and not at all before ours that do not read it.
    Nothing that the engine's kernels read is written before our last kernel, so whatever fails, theirs can still run.
    The kernels of all `cold` plans of a layer are compiled and loaded at its first call, whatever its number of tokens:
    in a server's own warm-up, before it reports ready. So no later request waits for a compiler. While a CUDA graph is
    captured nothing can be loaded; a layer that is still cold there runs the engine's kernels.

    Raises:
        EngineError: the original takes other arguments than those that are known.
    """
    parameters, is_traced = kernel_sequence.parameters(original), running_engine.is_traced()
    is_capturing = running_engine.is_capturing()

    def engines(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = sort_now(args, kwargs)
        return original(*args, **kwargs)

    @functools.wraps(original)
    def _fused_moe_kernel_sequence(*args: Any, **kwargs: Any) -> Any:
        plan = kernel_sequence.plan_of(args, kwargs)
        if (plan is None and not cold) or is_traced():
            return engines(args, kwargs) if is_put_off(args, kwargs) else original(*args, **kwargs)
        given = parameters.given(args, kwargs)
        weights = w1, w2 = tuple(given["w1"].shape), tuple(given["w2"].shape)
        to_load = cold.pop(weights, ()) if weights in cold and not is_capturing() else ()
        if weights in cold or (plan is None and not to_load):
            return engines(args, kwargs)
        why, is_lasting = None, True
        try:
            gate = kernel_sequence.refusal(parameters, given, engine)
            if gate is not None:
                why = gate.why
            else:
                _load_kernels(given, to_load, engine)
                if plan is not None:
                    return kernel_sequence.run(given, plan, engine)
        except Exception as error:  # the engine's own kernels have all that they need
            why = f"{type(error).__name__}: {show(error)}"
            is_lasting = bool(to_load) or type(error).__name__ != _OUT_OF_MEMORY
        if why is not None:
            warn_once(f"the engine's own kernels run for a layer with weights of {w1} and {w2}: {why}")
            if is_lasting:
                decline(w1, w2)
        return engines(args, kwargs)

    return _fused_moe_kernel_sequence


def sort_hook(original: Callable[..., Any], next_sort: NextSort) -> Callable[..., Any]:
    """A function to stand where the layer's sort stood: it puts off what the lookup before it said it would."""
    is_traced = running_engine.is_traced()

    @functools.wraps(original)
    def moe_align_block_size(*args: Any, **kwargs: Any) -> Any:
        if is_traced() or not next_sort.take():
            return original(*args, **kwargs)
        return DeferredSort(lambda: original(*args, **kwargs)).parts()

    return moe_align_block_size


def _load_kernels(given: kernel_sequence.Arguments, plans: Sequence[Plan], engine: SglangHookPoints) -> None:
    if not plans:
        return
    begun = time.perf_counter()
    for plan in plans:
        kernel_sequence.load_kernels(given, plan, engine)
    log.info(
        "sglang-moe-ext: the kernels of %d plans are loaded for weights of %s and %s, in %.1f s",
        len(plans), tuple(given["w1"].shape), tuple(given["w2"].shape), time.perf_counter() - begun,
    )  # fmt: skip


ENGINE = "sglang"


def table_dirs(engine: SglangInstallation) -> list[TableDir]:
    """In order. A folder that the user names to the engine takes the place of the engine's own."""
    named, own = os.environ.get(env.SGLANG_CONFIG_DIR), user_store.root_if_any()
    tuned = package_data.folder("tuned_configs")
    return [
        *([] if own is None else [TableDir("your", own / "tables" / ENGINE)]),
        *([] if tuned is None else [TableDir("the shipped", tuned / "configs")]),
        TableDir(
            "the engine's",
            Path(named) / "configs" if named else engine.configs_root,
            is_engines=True,
            is_asked_for=bool(named) and not (own is not None and own / "overlay" in Path(named or "").parents),
        ),
    ]


def check_config_dir(shape: MoEShape, device_name: str, engine: SglangInstallation) -> list[str]:
    """What is odd about the folder that SGLANG_MOE_CONFIG_DIR names, for that layer."""
    named = os.environ.get(env.SGLANG_CONFIG_DIR)
    if not named or engine.triton is None:
        return []
    found, root = [], Path(named)
    configs, folder = root / "configs", table_names.version_folder(engine.triton)
    if not configs.is_dir():
        found.append(
            f"{env.SGLANG_CONFIG_DIR}={show(named)} has no folder configs: SGLang alone raises FileNotFoundError at "
            "the first table that it does not find; it looks for configs/triton_X_Y_Z/*.json there"
        )
    name = table_names.file_name(table_names.table_key(shape, device_name))
    wrong_folders = (
        root,
        root.parent,
        root / folder,
        root.parent / folder,
        root / "configs",
        *_subfolders(root, folder),
    )
    for wrong in wrong_folders:
        if (wrong / name).is_file() and not (configs / folder / name).is_file():
            found.append(f"{show(str(wrong / name))} is not read: SGLang looks for it in {show(str(configs / folder))}")
            break
    return found


def _subfolders(root: Path, folder: str) -> tuple[Path, ...]:
    return root / folder / "configs", root / folder / folder, root / "configs" / "configs" / folder


log = logging.getLogger(__name__)


def excludes_plugin(wanted: str | None, name: str) -> bool:
    """Whether that value of the engine's variable leaves out the plugin of that name."""
    return bool(wanted) and name not in (it.strip() for it in (wanted or "").split(","))


def install_hooks(layer: ModuleType, way: str) -> sglang_lookup_hook.ConfigResolver:
    """Replace the engine's functions, all or none.

    Raises:
        EngineError: something of the engine is not as it was.
    """
    engine = _with_known_sequence(hook_points.locate(layer))
    resolver = sglang_lookup_hook.ConfigResolver(
        engine, lambda: table_dirs(engine.engine), lambda: _first_call(engine, way)
    )
    launcher = GuardedLauncher(engine.launch, hook_points.CONFIG_POSITION, engine.override)
    replaced = [
        (engine.lookup, sglang_lookup_hook.lookup_hook(engine, resolver)),
        (engine.launch, launch_guard.launch_hook(launcher)),
    ]
    if engine.sequence is not None:
        replaced.append(
            (engine.sequence, sequence_hook(engine, engine.sequence, resolver.decline_plan, resolver.plans.cold))
        )
    for original, ours in replaced:
        running_engine.replace("sglang", original, ours)
    if engine.sequence is not None and (sort := getattr(engine.layer, hook_points.SORT, None)) is not None:
        # In the layer alone: others sort as well, and hand the result to kernels that we do not stand for.
        setattr(engine.layer, hook_points.SORT, sort_hook(sort, resolver.next_sort))
    return resolver


def _with_known_sequence(engine: SglangHookPoints) -> SglangHookPoints:
    """Without the sequence of kernels where it takes other arguments: all else can still be put in."""
    try:
        if engine.sequence is not None:
            known_sequence.parameters(engine.sequence)
    except EngineError as error:
        warn_once(f"the engine's own kernels run: {error}")
        return replace(engine, sequence=None)
    return engine


def _first_call(engine: SglangHookPoints, way: str) -> None:
    """A layer runs: the server's log is open, and all of the engine has been imported."""
    log.info("sglang-moe-ext %s is active in SGLang %s, by %s", __version__, engine.engine.version_text, way)
    if os.environ.get(env.CAPTURE):
        _capture()


def _capture() -> None:
    try:
        from sglang_moe_ext.engines.sglang import routing_hook
        from sglang_moe_ext.serving import capture

        wish, runner = capture.parse_request(os.environ), sys.modules.get(routing_hook.MODULE)
        if wish is not None and runner is not None:
            capture.install(runner, wish)
    except Exception as error:  # the layers run uncaptured
        warn_once(f"{env.CAPTURE} is passed over: {type(error).__name__}: {error}")
