"""The functions that stand in the place of vLLM's `get_moe_configs` and `try_get_optimal_moe_config`.

The first is asked by what stands in a file's name: neither M nor the hidden size nor top-k, and which table is best
depends on all three. So the second, which is told them, is replaced too: ours notes them and calls the engine's own,
which asks the first for a table, and takes its nearest entry, or its default, or its override, as it ever did.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sglang_moe_ext.engines import config_dict, lookup_args
from sglang_moe_ext.engines.config_dict import ConfigDict
from sglang_moe_ext.engines.lookup_args import LookupLayer
from sglang_moe_ext.engines.vllm.hook_points import VllmHookPoints
from sglang_moe_ext.engines.vllm.launch_args import config_dict_of
from sglang_moe_ext.serving import selection
from sglang_moe_ext.serving.guard import warn_once
from sglang_moe_ext.serving.selection import Choice, EngineDefault, EngineEntry, OurEntry, TableSelector
from sglang_moe_ext.serving.table_search import TableDir

Rows = dict[int, ConfigDict] | None
"""A table as the engine has it; None: its default runs."""
Key = tuple[int, Any, Any, int, str | None, tuple[int, ...] | None]
"""Of a call of the lookup: M, shapes of w1 and w2, top_k, dtype and block."""
_MOST_ANSWERS = 65536
"""Of a process: every layer for every M up to 16384, a few times over."""


@dataclass(frozen=True, slots=True)
class VllmCall:
    """For whom the engine's own lookup asks for a table."""

    layer: LookupLayer
    tokens: int


class VllmTableResolver:
    """Answers the engine's question for a table, and remembers what its lookup made of that."""

    def __init__(
        self, engine: VllmHookPoints, table_dirs: Callable[[], Sequence[TableDir]], at_first_call: Callable[[], None]
    ) -> None:
        self._engine, self._choices, self._at_first_call = engine, TableSelector(engine, table_dirs), at_first_call
        self._asking = threading.local()
        self.answers: dict[Key, ConfigDict] = {}

    def choice(self, layer: LookupLayer, tokens: int) -> Choice:
        """Which configuration runs, before the guard looks at it."""
        if self._engine.runs_cuda(layer, tokens):
            return EngineEntry("a CUDA kernel runs it, for which no table of ours is")
        return self._choices.of(layer, tokens)

    def answered(self, key: Key, own: Callable[[], ConfigDict]) -> ConfigDict:
        """What the engine's own lookup returns, while the tables that it asks us for are for that call."""
        tokens, *of_layer = key
        try:
            call = VllmCall(lookup_args.lookup_layer(*of_layer), tokens)
        except (TypeError, ValueError, IndexError):  # shapes that are none
            return own()
        with self._asking_for(call):
            entry = config_dict.drop_tma(own())
        if len(self.answers) >= _MOST_ANSWERS:
            self.answers.clear()
        self.answers[key] = entry
        return entry

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
        self._at_first_call()
        choice = self.choice(call.layer, call.tokens)
        self._choices.say(call.layer, choice)
        match choice:
            case OurEntry(up):
                return {call.tokens: config_dict_of(up)}
            case EngineDefault():
                return None
            case EngineEntry():
                return _unless_broken(own)

    def _whole(self, named: LookupLayer, own: Callable[[], Rows]) -> Rows:
        if self._engine.is_deterministic():
            return own()
        tables = self._choices.search(named, any_layer=True)
        table = None if tables is None else selection.best_table(tables)
        return _unless_broken(own) if table is None else {m: config_dict_of(config) for m, config in table.up.items()}

    def forget(self) -> None:
        """Read all tables anew."""
        self.answers.clear()
        self._choices.forget()


def _unless_broken(own: Callable[[], Rows]) -> Rows:
    """A table of the engine's own, or of the user's, that it cannot read ends a server: its default does not."""
    try:
        return own()
    except Exception as error:
        warn_once(f"the engine's default runs, its own lookup failed: {type(error).__name__}: {error}")
        return None


def table_hook(engine: VllmHookPoints, resolver: VllmTableResolver) -> Callable[..., Any]:
    """A function to stand where `engine.table` stood, before its cache. It never raises where that would not have."""
    original = engine.table

    @functools.wraps(original)
    def get_moe_configs(
        E: int,  # noqa: N803 - the engine's names
        N: int,  # noqa: N803
        dtype: str | None,
        block_n: int | None = None,
        block_k: int | None = None,
    ) -> Any:
        def own() -> Rows:
            rows: Rows = original(E, N, dtype, block_n, block_k)
            return rows

        try:
            block = (block_n, block_k) if block_n and block_k else None
            return resolver.rows(lookup_args.layer_from_name(E, N, dtype, block), own)
        except Exception as error:  # whatever is broken here, the engine's own lookup runs
            warn_once(f"the engine's own tables are taken, ours failed: {type(error).__name__}: {error}")
            return own()

    def cache_clear() -> None:
        resolver.forget()
        original.cache_clear()

    named = vars(get_moe_configs)
    named |= {"cache_clear": cache_clear, "cache_info": original.cache_info}
    named |= {"cache_parameters": original.cache_parameters}
    return get_moe_configs


def lookup_hook(engine: VllmHookPoints, resolver: VllmTableResolver) -> Callable[..., Any]:
    """A function to stand where `engine.lookup` stood. It never raises where that would not have."""
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
        except TypeError:  # a shape that is a list
            return own()
        if rest or named or engine.override():
            return own()
        return (answer or resolver.answered(key, own)).copy()

    return try_get_optimal_moe_config
