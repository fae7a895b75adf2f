"""The function that stands in the place of SGLang's `try_get_optimal_moe_config`: it answers for every layer and M."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sglang_moe_ext.core import Projection, TileConfig
from sglang_moe_ext.engines import config_dict, lookup_args, running_engine
from sglang_moe_ext.engines.config_dict import ConfigDict, ConfigWithPlan
from sglang_moe_ext.engines.lookup_args import LookupLayer
from sglang_moe_ext.engines.sglang.deferred_sort import NextSort
from sglang_moe_ext.engines.sglang.hook_points import SglangHookPoints
from sglang_moe_ext.few_tokens_config import FewTokensConfig
from sglang_moe_ext.kernel_plans import Plan
from sglang_moe_ext.serving.guard import ConfigGuard, EntryChange, RefusedEntry, SafeEntry, warn_once
from sglang_moe_ext.serving.kernel_selection import KernelPlans
from sglang_moe_ext.serving.table_search import TableDir
from sglang_moe_ext.serving.table_selection import Choice, EngineDefault, EngineEntry, OurEntry, TableSelector
from sglang_moe_ext.untrusted import show

_MOST_ANSWERS = 65536
"""Of a process: every layer for every M up to 16384, a few times over."""


EntryChanges = dict[Projection, EntryChange]


@dataclass(frozen=True, slots=True)
class ServedConfigs:
    """What the engine's lookup returns, in parts; both entries are copied before they leave.

    `plan`: what runs instead of the engine's own kernels, which both entries are for. `changes`: what the guard did.
    `in_graph`: the answer while a CUDA graph is captured, where it is another one.
    """

    up: ConfigDict
    down: ConfigDict | None
    most_block_m: int | None
    plan: Plan | None = None
    changes: EntryChanges = field(default_factory=dict)
    in_graph: ServedConfigs | None = None

    def down_to_hand_on(self) -> ConfigDict | None:
        """A fresh entry of the down GEMM."""
        if self.down is not None and self.plan is not None:
            return ConfigWithPlan(self.down, self.plan)
        return None if self.down is None else self.down.copy()


Answers = dict[Any, ServedConfigs]
"""What was answered before, by what was asked; emptied where an answer is no longer to be given."""


@dataclass(frozen=True, slots=True)
class SglangCall:
    """One call of the lookup. `wants_down`: it asks for the entry of the down projection too."""

    layer: LookupLayer
    tokens: int
    is_marlin: bool
    wants_down: bool


class ConfigResolver:
    """Finds answers: reads the tables of a layer when it first asks, and says in a line what it found."""

    def __init__(
        self, engine: SglangHookPoints, table_dirs: Callable[[], Sequence[TableDir]], at_first_call: Callable[[], None]
    ) -> None:
        self._engine, self._choices = engine, TableSelector(engine, table_dirs)
        self._at_first_call: Callable[[], None] | None = at_first_call
        self.answers = Answers()
        self.plans = KernelPlans(engine, table_dirs, self._choices.tables, is_hooked=engine.sequence is not None)
        self.next_sort = NextSort()
        self._guards: dict[str, ConfigGuard] = {}

    def __call__(self, call: SglangCall, original: Callable[[], Any]) -> ServedConfigs:
        """`original` is the engine's own lookup, called as this was called."""
        if (at_first_call := self._at_first_call) is not None:
            self._at_first_call = None
            at_first_call()
        choice = self.choice(call.layer, call.tokens)
        self._choices.say(call.layer, choice)
        match choice:
            case OurEntry():
                answer = _take(choice)
            case EngineDefault():
                answer = self._default(call)
            case EngineEntry(_, instead):
                answer = self._ask_engine(call, original, instead)
        if not call.wants_down:  # the caller hands the entry to the kernel as it is, and that knows no USE_TMA
            answer = replace(answer, up=config_dict.drop_tma(answer.up))
        return self._with_plans(answer, call) if call.wants_down else self._check(answer, call)

    def _with_plans(self, answer: ServedConfigs, call: SglangCall) -> ServedConfigs:
        eager, in_graph = (self.plan(call.layer, call.tokens, in_graph=it) for it in (False, True))
        entries = {
            plan: self._check(answer if plan is None else _attach_plan(plan, answer), call)
            for plan in {eager, in_graph}
        }
        return entries[eager] if eager == in_graph else replace(entries[eager], in_graph=entries[in_graph])

    def _default(self, call: SglangCall) -> ServedConfigs:
        layer, block = call.layer, call.layer.block_shape
        rest = layer.top_k, layer.dtype, call.is_marlin, None if block is None else list(block)
        return ServedConfigs(
            self._engine.default_entry(call.tokens, (layer.w1_shape, layer.w2_shape), rest), None, None
        )

    def _ask_engine(self, call: SglangCall, original: Callable[[], Any], instead: OurEntry | None) -> ServedConfigs:
        """A table that the engine cannot read ends a server; our reading of it, or the engine's default, does not."""
        try:
            answer = from_engine(original(), call.wants_down)
            if not isinstance(answer.up, dict):
                raise TypeError(f"an entry that is no object: {show(answer.up, 40)}")
            return answer
        except Exception as error:
            answer = self._default(call) if instead is None else _take(instead)
            what = "the engine's default runs" if instead is None else f"the engine's {instead.path.name} is read by us"
            warn_once(f"{what}, its own lookup failed: {type(error).__name__}: {show(error)}")
            return answer

    def choice(self, layer: LookupLayer, tokens: int) -> Choice:
        """Which configuration runs, before the guard looks at it."""
        return self._choices.select(layer, tokens)

    def plan(self, layer: LookupLayer, tokens: int, *, in_graph: bool = False) -> Plan | None:
        """What runs in place of the engine's own kernels, before anything is known of the batch but its size."""
        return self.plans.select(layer, tokens, in_graph=in_graph)

    @property
    def engine(self) -> SglangHookPoints:
        """The engine that is hooked."""
        return self._engine

    def changes(self, layer: LookupLayer, tokens: int) -> EntryChanges:
        """What the guard changed of the entries that were answered for that call."""
        w1, w2, block = layer.w1_shape, layer.w2_shape, layer.block_shape
        answer = self.answers.get((tokens, w1, w2, layer.top_k, layer.dtype, block, layer.per_channel, True, False))
        return {} if answer is None else answer.changes

    def remarks(self, layer: LookupLayer) -> tuple[str, ...]:
        """What is odd about the tables of the layer."""
        found = self._choices.tables(layer)
        return () if found is None else found.remarks

    def decline_plan(self, w1_shape: tuple[int, ...], w2_shape: tuple[int, ...]) -> None:
        """Never again choose our kernels for layers of such weights."""
        if self.plans.decline(w1_shape, w2_shape):
            self.answers.clear()

    def _check(self, answer: ServedConfigs, call: SglangCall) -> ServedConfigs:
        """The answer as it may be launched. An entry that cannot be mended is replaced by the engine's default."""
        shape, device_name = call.layer.shape, self._engine.device_name()
        if shape is None or device_name is None:
            return answer
        if device_name not in self._guards:
            self._guards[device_name] = ConfigGuard(
                self._engine.engine.version, running_engine.running_gpu(device_name)
            )
        guard = self._guards[device_name]
        up = guard.check(answer.up, shape, "up")
        changes = _changes("up", answer.up, up)
        if isinstance(up, RefusedEntry):
            if answer.down is not None:
                changes |= {"down": EntryChange(answer.down, f"the up projection's entry is refused: {up.why}")}
            answer = self._default(call)
            default = guard.check(answer.up, shape, "up")
            return replace(answer, up=default.entry if isinstance(default, SafeEntry) else answer.up, changes=changes)
        answer = replace(answer, up=up.entry)
        if answer.down is not None:
            down = guard.check(answer.down, shape, "down")
            changes |= _changes("down", answer.down, down)
            answer = replace(answer, down=down.entry if isinstance(down, SafeEntry) else config_dict.drop_tma(up.entry))
        if answer.most_block_m is not None and answer.most_block_m > LARGEST_BLOCK_M:
            answer = replace(answer, most_block_m=answer.up["BLOCK_SIZE_M"])
        return replace(answer, changes=changes)


LARGEST_BLOCK_M = 1024
"""The engine allocates rows for blocks of the largest BLOCK_SIZE_M of a table, which a stranger's table may state."""


def _take(entry: OurEntry) -> ServedConfigs:
    """The entry as the engine has one, with the launch options of its table."""
    up, down = config_dict.config_dict_of(entry.up) | dict(entry.up_options), None
    if entry.down is not None:
        down = config_dict.config_dict_of(entry.down) | dict(entry.down_options)
    return ServedConfigs(up, down, entry.most_block_m if down is not None else None)


def _changes(projection: Projection, written: ConfigDict, checked: SafeEntry | RefusedEntry) -> EntryChanges:
    why = checked.why if isinstance(checked, SafeEntry) else f"refused: {checked.why}"
    return {} if why is None else {projection: EntryChange(written, why)}


def _attach_plan(plan: Plan, answer: ServedConfigs) -> ServedConfigs:
    """The plan, with entries for the engine's own kernels where it may not run: for its blocks of the sort."""
    if isinstance(plan, FewTokensConfig):
        if answer.down is not None:
            return replace(answer, plan=plan)
        return replace(answer, down=config_dict.drop_tma(answer.up), most_block_m=answer.up["BLOCK_SIZE_M"], plan=plan)
    if answer.up["BLOCK_SIZE_M"] == plan.block_m and answer.down is not None:
        return replace(answer, plan=plan)
    known = plan.up if isinstance(plan.up, TileConfig) else config_dict.tile_of(answer.up)
    entry = config_dict.config_dict_of(replace(known, block_m=plan.block_m, use_tma=False))
    return ServedConfigs(entry, dict(entry), plan.block_m, plan)


def from_engine(returned: Any, wants_down: bool) -> ServedConfigs:
    """What the engine's own lookup returned, in parts."""
    if not wants_down:
        return ServedConfigs(returned, None, None)
    up, (down, most_block_m) = returned
    return ServedConfigs(up, down, most_block_m)


def lookup_hook(engine: SglangHookPoints, resolve: ConfigResolver) -> Callable[..., Any]:
    """A function to stand where `engine.lookup` stood. It never raises where that would not have."""
    original, answers, next_sort = engine.lookup, resolve.answers, resolve.next_sort
    is_capturing, is_traced = running_engine.is_capturing(), running_engine.is_traced()

    def resolved(call: SglangCall, own: Callable[[], Any]) -> ServedConfigs:
        try:
            return resolve(call, own)
        except Exception as error:  # whatever is broken here, the engine's own lookup runs
            warn_once(f"the engine's own lookup runs, ours failed: {type(error).__name__}: {show(error)}")
            return from_engine(own(), call.wants_down)

    @functools.wraps(original)
    def try_get_optimal_moe_config(
        w1_shape: Any,
        w2_shape: Any,
        top_k: int,
        dtype: str | None,
        M: int,  # noqa: N803 - the engine's name
        is_marlin: bool = False,
        block_shape: Any = None,
        *rest: Any,
        **named: Any,
    ) -> Any:
        per_channel, wants_down = named.get("per_channel_quant", False), named.get("return_down_config", False)
        if next_sort.was_put_off and not is_traced():
            next_sort.decide(is_deferred=False)
        try:
            block = tuple(block_shape) if block_shape else None
            key = (M, w1_shape, w2_shape, top_k, dtype, block, per_channel, wants_down, is_marlin)
            answer = answers.get(key)
        except (TypeError, ValueError):  # a shape that is a list, a block that is none
            return original(w1_shape, w2_shape, top_k, dtype, M, is_marlin, block_shape, *rest, **named)
        if rest or engine.override():
            return original(w1_shape, w2_shape, top_k, dtype, M, is_marlin, block_shape, *rest, **named)
        if answer is None:
            try:
                layer = lookup_args.lookup_layer(w1_shape, w2_shape, top_k, dtype, block_shape, per_channel)
            except (TypeError, ValueError, LookupError):  # no shapes of weights
                return original(w1_shape, w2_shape, top_k, dtype, M, is_marlin, block_shape, *rest, **named)
            answer = resolved(
                SglangCall(layer, M, is_marlin, wants_down),
                lambda: original(w1_shape, w2_shape, top_k, dtype, M, is_marlin, block_shape, **named),
            )
            if len(answers) >= _MOST_ANSWERS:
                answers.clear()
            answers[key] = answer
        if answer.in_graph is not None and is_capturing():
            answer = answer.in_graph
        if wants_down:
            if answer.plan is not None and not is_traced():
                next_sort.decide(is_deferred=True)
            return answer.up.copy(), (answer.down_to_hand_on(), answer.most_block_m)
        return answer.up.copy()

    return try_get_optimal_moe_config
