"""Replace vLLM's `get_moe_configs` and `try_get_optimal_moe_config`.

The first is called with what a file's name says: neither M nor the hidden size nor top-k, and which table is best
depends on all three. The second is called with them, so it is replaced too: ours notes them and calls the engine's own,
which calls the first for a table, and takes its nearest entry, or its default, or its override, as before.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from sglang_moe_ext.core import Projection
from sglang_moe_ext.engines import config_dict, lookup_args
from sglang_moe_ext.engines.config_dict import ConfigDict
from sglang_moe_ext.engines.lookup_args import LookupLayer
from sglang_moe_ext.engines.vllm.hook_points import VllmHookPoints
from sglang_moe_ext.engines.vllm.launch_args import clamp_to_block, config_dict_of
from sglang_moe_ext.serving import table_selection
from sglang_moe_ext.serving.guard import ConfigGuard, EntryChange, RefusedEntry, SafeEntry, warn_once
from sglang_moe_ext.serving.table_search import FoundTables, TableDir
from sglang_moe_ext.serving.table_selection import Choice, EngineDefault, EngineEntry, OurEntry, TableSelector
from sglang_moe_ext.untrusted import show

Rows = dict[int, ConfigDict] | None
"""A table as the engine has it; None: its default runs."""
Key = tuple[int, Any, Any, int, str | None, tuple[int, ...] | None]
"""Of a call of the lookup: M, shapes of w1 and w2, top_k, dtype and block."""
_MOST_ANSWERS = 65536
"""Of a process: every layer for every M up to 16384, a few times over."""


@dataclass(frozen=True, slots=True)
class VllmCall:
    """The call for which the engine's own lookup asks for a table.

    `wants_default`: give it none. `is_alone`: give it the engine's own.
    """

    layer: LookupLayer
    tokens: int
    wants_default: bool = False
    is_alone: bool = False


class VllmTableResolver:
    """Answers the engine's question for a table, and remembers what its lookup made of that."""

    def __init__(
        self, engine: VllmHookPoints, table_dirs: Callable[[], Sequence[TableDir]], at_first_call: Callable[[], None]
    ) -> None:
        self._engine, self._choices, self._at_first_call = (
            engine,
            TableSelector(engine, table_dirs, "vllm"),
            at_first_call,
        )
        self._asking = threading.local()
        self.answers: dict[Key, ConfigDict] = {}
        self.refused: dict[tuple[LookupLayer, int], EntryChange] = {}

    def choice(self, layer: LookupLayer, tokens: int) -> Choice:
        """Which configuration runs, before the guard looks at it."""
        if self._engine.runs_cuda(layer, tokens):
            return EngineEntry("a CUDA kernel runs it, for which no table of ours is")
        return self._choices.select(layer, tokens)

    def changes(self, layer: LookupLayer, tokens: int) -> Mapping[Projection, EntryChange]:
        """What was refused of the entries that were answered for that call."""
        change = self.refused.get((layer, tokens))
        return {} if change is None else {"up": change}

    def ask_alone(self, layer: LookupLayer, tokens: int, block_shape: Sequence[int] | None) -> ConfigDict:
        """What the engine's own lookup returns without our tables."""
        shapes = layer.w1_shape, layer.w2_shape
        with self._asking_for(VllmCall(layer, tokens, is_alone=True)):
            entry: ConfigDict = self._engine.lookup(*shapes, layer.top_k, layer.dtype, tokens, block_shape=block_shape)
        return entry

    def tables(self, layer: LookupLayer) -> FoundTables | None:
        """The tables that the layer's configurations come from."""
        return self._choices.tables(layer)

    def remarks(self, layer: LookupLayer) -> tuple[str, ...]:
        """What is odd about the tables of the layer."""
        found = self._choices.tables(layer)
        return () if found is None else found.remarks

    def answered(self, key: Key, own: Callable[[], ConfigDict]) -> ConfigDict:
        """What the engine's own lookup returns, while the tables that it asks us for are for that call."""
        tokens, *of_layer = key
        try:
            call = VllmCall(lookup_args.lookup_layer(*of_layer), tokens)
        except (TypeError, ValueError, LookupError):  # no shapes of weights
            return own()
        with self._asking_for(call):
            entry = own()
            if (why := self._why_refused(call, entry)) is not None:
                written = entry if isinstance(entry, Mapping) else {}
                self.refused[call.layer, tokens] = EntryChange(written, f"refused: {why}")
                with self._asking_for(replace(call, wants_default=True)):
                    entry = own()
            entry = config_dict.drop_tma(entry)
        if len(self.answers) >= _MOST_ANSWERS:
            self.answers.clear()
        self.answers[key] = entry
        return entry

    def _why_refused(self, call: VllmCall, entry: Any) -> str | None:
        """Why no launch can run blocks of that many rows: the launch guard mends all else, and keeps BLOCK_SIZE_M."""
        shape = call.layer.shape
        if shape is None or (isinstance(entry, Mapping) and "BLOCK_SIZE_N" not in entry):
            return None
        guard = ConfigGuard(self._engine.engine.version, None, "vllm")
        try:
            clamped = clamp_to_block(entry, shape)
        except (TypeError, LookupError):  # a stranger's entry that is no configuration
            clamped = entry
        match guard.check(clamped, shape, "up"):
            case RefusedEntry(why):
                return why
            case SafeEntry():
                return None

    @contextmanager
    def _asking_for(self, call: VllmCall) -> Iterator[None]:
        before, self._asking.call = getattr(self._asking, "call", None), call
        try:
            yield
        finally:
            self._asking.call = before

    def rows(self, named: LookupLayer, own: Callable[[], Rows]) -> Rows:
        """The table for the call that is asking, or for a layer of which only its names are known."""
        call: VllmCall | None = getattr(self._asking, "call", None)
        if call is None:
            return self._whole(named, own)
        if call.wants_default:
            return None
        if call.is_alone:
            return own()
        self._at_first_call()
        choice = self.choice(call.layer, call.tokens)
        self._choices.say(call.layer, choice)
        match choice:
            case OurEntry():
                return _take(choice, call.tokens)
            case EngineDefault():
                return None
            case EngineEntry(_, instead):
                return _ask_engine(own, lambda: None if instead is None else _take(instead, call.tokens))

    def _whole(self, named: LookupLayer, own: Callable[[], Rows]) -> Rows:
        if self._engine.is_deterministic():
            return own()
        tables = self._choices.search(named, any_layer=True)
        table = None if tables is None else table_selection.best_table(tables)
        if table is None:
            return _ask_engine(own, lambda: None)
        return {m: config_dict_of(config) for m, config in table.up.items()}

    def forget(self) -> None:
        """Read all tables anew."""
        self.answers.clear()
        self.refused.clear()
        self._choices.forget()


def _take(entry: OurEntry, tokens: int) -> Rows:
    """A table of that entry alone, with the launch options that its file has."""
    return {tokens: config_dict_of(entry.up) | dict(entry.up_options)}


def _ask_engine(own: Callable[[], Rows], instead: Callable[[], Rows]) -> Rows:
    """A table that the engine cannot read ends a server; our reading of it, or the engine's default, does not."""
    try:
        return own()
    except Exception as error:
        rows = instead()
        what = "the engine's default runs" if rows is None else "the engine's table is read by us"
        warn_once(f"{what}, its own lookup failed: {type(error).__name__}: {show(error)}")
        return rows


def table_hook(engine: VllmHookPoints, resolver: VllmTableResolver) -> Callable[..., Any]:
    """The function that replaces `engine.table`, before its cache. It never raises if that would not have."""
    original = engine.table

    @functools.wraps(original)
    def get_moe_configs(
        E: int,  # noqa: N803 - the engine's names
        N: int,  # noqa: N803
        dtype: str | None,
        block_n: int | None = None,
        block_k: int | None = None,
        *rest: Any,
        **named: Any,
    ) -> Any:
        def own() -> Rows:
            rows: Rows = original(E, N, dtype, block_n, block_k, *rest, **named)
            return rows

        if rest or named:  # arguments of a later release
            return own()
        try:
            block = (block_n, block_k) if block_n and block_k else None
            return resolver.rows(lookup_args.layer_from_name(E, N, dtype, block), own)
        except Exception as error:  # whatever is broken here, the engine's own lookup runs
            warn_once(f"the engine's own tables are taken, ours failed: {type(error).__name__}: {show(error)}")
            return own()

    def cache_clear() -> None:
        resolver.forget()
        original.cache_clear()

    attributes = vars(get_moe_configs)
    attributes |= {"cache_clear": cache_clear, "cache_info": original.cache_info}
    attributes |= {"cache_parameters": original.cache_parameters}
    return get_moe_configs


def lookup_hook(engine: VllmHookPoints, resolver: VllmTableResolver) -> Callable[..., Any]:
    """The function that replaces `engine.lookup`. It never raises if that would not have."""
    original, answers = engine.lookup, resolver.answers

    @functools.wraps(original)
    def try_get_optimal_moe_config(
        w1_shape: Any,
        w2_shape: Any,
        top_k: int,
        dtype: str | None,
        M: int,  # noqa: N803 - the engine's name
        block_shape: Any = None,
        *rest: Any,
        **named: Any,
    ) -> Any:
        def own() -> Any:
            return original(w1_shape, w2_shape, top_k, dtype, M, block_shape, *rest, **named)

        try:
            key: Key = (M, w1_shape, w2_shape, top_k, dtype, tuple(block_shape) if block_shape else None)
            answer = answers.get(key)
        except (TypeError, ValueError):  # a shape that is a list, a block that is none
            return own()
        if rest or named or engine.override():
            return own()
        return (answer or resolver.answered(key, own)).copy()

    return try_get_optimal_moe_config
