"""Run warp-specialized Gluon kernels on a CPU, without Triton's compiler.

The partitions of warp_specialize are Python threads. TMA, cp.async and wgmma do their work as late as the kernel lets
them, in random order, so that a stage given back too early, a wrong parity, a missing wait or a deadlock shows as wrong
numbers, an assertion or a timeout. Pointers, descriptors, mbarriers and shared memory are modelled; layouts, fences
between proxies, registers and timing are not: offline compilation and a GPU check those.
"""

from __future__ import annotations

import functools
import random
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as real_language
from triton.experimental.gluon._runtime import GluonJITFunction

from sglang_moe_ext.kernels import warp_specialized, warp_specialized_down, warp_specialized_up

TIMEOUT_S = 20.0
"""Of a wait. A run takes a fraction of a second; only a deadlock takes longer."""


class SimulationError(Exception):
    """The kernel broke a rule of the hardware: a deadlock, an arrival too many, a read before its wait."""


class Cta:
    """One program: a lock, the work that the hardware has not done yet, each partition's pending products."""

    def __init__(self, program: int, programs: int, seed: int, timeout_s: float) -> None:
        self.program, self.programs, self.timeout_s = program, programs, timeout_s
        self.dice = random.Random(seed)
        self.is_lazy = seed % 2 == 0
        self.partitions = 1
        self.waiting: list[Callable[[], bool]] = []
        self.changed = threading.Condition()
        self.pending: list[Callable[[], None]] = []
        self.partition = threading.local()
        self.is_done = False
        self.failures: list[BaseException] = []
        threading.Thread(target=self._hardware, daemon=True).start()

    def _hardware(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.is_done or self._may_work())
                if not self.pending:
                    return
                job = self.pending.pop(self.dice.randrange(len(self.pending)))
                try:
                    job()
                except SimulationError as error:
                    self.failures.append(error)
                self.changed.notify_all()

    def is_idle(self) -> bool:
        return not self.pending

    def _may_work(self) -> bool:
        """On even seeds only when no partition can go on without it: as late as may be."""
        if not self.is_lazy or self.failures:
            return bool(self.pending)
        stuck = len(self.waiting) >= self.partitions and not any(test() for test in self.waiting)
        return bool(self.pending) and stuck

    def left(self) -> None:
        """A partition has ended."""
        with self.changed:
            self.partitions -= 1
            self.changed.notify_all()

    def later(self, job: Callable[[], None]) -> None:
        with self.changed:
            self.pending.append(job)
            self.changed.notify_all()

    def wait_until(self, test: Callable[[], bool], what: str) -> None:
        with self.changed:
            self.waiting.append(test)
            self.changed.notify_all()
            came = self.changed.wait_for(lambda: test() or bool(self.failures), self.timeout_s)
            self.waiting.remove(test)
        if self.failures or not came:
            raise SimulationError(f"deadlock in {what}" if not self.failures else f"stopped in {what}")

    def own(self, name: str) -> list[Any]:
        """A list of the running partition."""
        return self.partition.__dict__.setdefault(name, [])


_cta: Cta


class Pointer:
    """Elements of flat storage, by offsets that may be a tensor."""

    def __init__(self, storage: Tensor, offset: Any = 0) -> None:
        self.storage, self.offset = storage, offset

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.storage, self.offset + more)


class SharedMemory:
    """A view of shared memory; it starts as NaN."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, at: int) -> SharedMemory:
        return SharedMemory(self.data[at])

    def slice(self, start: int, length: int, dim: int = 0) -> SharedMemory:
        return SharedMemory(self.data.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> SharedMemory:
        return SharedMemory(self.data.permute(order))

    def store(self, value: Any) -> None:
        busy = [token for token in _cta.own("stores") if not token["done"] and token["data"] == self.data.data_ptr()]
        if busy:
            raise SimulationError("a buffer is written while a TMA store reads it")
        self.data.copy_(_value(value))


class Barrier:
    """An mbarrier: a count of arrivals and of bytes, and the parity of its phase."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0

    def arrive(self, arrivals: int) -> None:
        self.missing -= arrivals
        if self.missing < 0:
            raise SimulationError("more arrivals at a barrier than it was made for")
        self.complete()

    def complete(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase ^= 1
            self.missing = self.count
            _cta.changed.notify_all()


class Barriers:
    def __init__(self, count: int) -> None:
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, at: int) -> Barrier:
        return self.barriers[at]


class Descriptor:
    """A tensor in boxes, as TMA sees it: zeros outside when read, nothing outside when written."""

    def __init__(self, tensor: Tensor, block_shape: list[int]) -> None:
        self.tensor, self.dtype, self.layout = tensor, tensor.dtype, None
        size = tensor.element_size() * functools.reduce(lambda x, y: x * y, block_shape)
        self.block_type = types.SimpleNamespace(shape=list(block_shape), nbytes=size)

    def box(self, corner: list[int]) -> tuple[Tensor, slice, slice]:
        """The part of the box at `corner` that is in the tensor, and where it is in the box."""
        spans = [
            (max(first, 0), max(min(first + side, size), 0), first)
            for first, side, size in zip(corner, self.block_type.shape, self.tensor.shape, strict=True)
        ]
        (top, bottom, row), (left, right, column) = spans
        bottom, right = max(bottom, top), max(right, left)
        return self.tensor[top:bottom, left:right], slice(top - row, bottom - row), slice(left - column, right - column)


class Product:
    """A wgmma: `value` once it has run."""

    def __init__(self, a: SharedMemory, b: SharedMemory, acc: Any, *, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.value: Tensor | None = None

    def run(self) -> None:
        product = self.a.data.float() @ self.b.data.float()
        self.value = product + _value(self.acc) if self.use_acc else product

    def __mul__(self, other: Any) -> Any:
        return _value(self) * other

    def __rmul__(self, other: Any) -> Any:
        return other * _value(self)


def _value(x: Any) -> Any:
    if isinstance(x, Product):
        if x.value is None:
            raise SimulationError("an accumulator is read before its product was awaited")
        return x.value
    return x


def load_box(desc: Descriptor, corner: list[int], barrier: Barrier, memory: SharedMemory) -> None:
    if list(memory.data.shape) != desc.block_type.shape:
        raise SimulationError(f"a box of {desc.block_type.shape} is loaded into {tuple(memory.data.shape)}")

    def land() -> None:
        found, rows, columns = desc.box(corner)
        memory.data.zero_()
        memory.data[rows, columns] = found
        barrier.bytes -= desc.block_type.nbytes
        barrier.complete()

    _cta.later(land)


def store_box(desc: Descriptor, corner: list[int], memory: SharedMemory) -> None:
    token = {"done": False, "data": memory.data.data_ptr()}
    _cta.own("stores").append(token)

    def land() -> None:
        target, rows, columns = desc.box(corner)
        target.copy_(memory.data[rows, columns])
        token["done"] = True

    _cta.later(land)


def store_wait(pendings: int) -> None:
    stores = _cta.own("stores")  # in order: all but the last `pendings` must have been read
    _cta.wait_until(lambda: all(token["done"] for token in stores[: len(stores) - pendings]), "store_wait")


def gather_rows(memory: SharedMemory, pointer: Pointer) -> None:
    _cta.own("copies").append(lambda: memory.data.copy_(pointer.storage[pointer.offset]))


class AsyncCopy:
    @staticmethod
    def commit_group() -> None:
        copies = _cta.own("copies")
        jobs, copies[:] = list(copies), []
        token = {"done": False}
        _cta.own("groups").append(token)

        def land() -> None:
            for job in jobs:
                job()
            token["done"] = True

        _cta.later(land)

    @staticmethod
    def wait_group(groups: int) -> None:
        """All groups but the last `groups` have landed."""
        committed = _cta.own("groups")
        _cta.wait_until(lambda: all(token["done"] for token in committed[: len(committed) - groups]), "wait_group")


class MBarrier:
    MBarrierLayout = staticmethod(lambda: "mbarrier")

    @staticmethod
    def init(barrier: Any, count: int) -> None:
        barrier.count = barrier.missing = count

    @staticmethod
    def expect(barrier: Barrier, size: int) -> None:
        with _cta.changed:
            barrier.bytes += size
            barrier.arrive(1)

    @staticmethod
    def arrive(barrier: Barrier) -> None:
        with _cta.changed:
            barrier.arrive(1)

    @staticmethod
    def wait(barrier: Barrier, parity: Any) -> None:
        """Returns once the phase of that parity is complete."""
        _cta.wait_until(lambda: barrier.phase != parity, "mbarrier.wait")


class Hopper:
    @staticmethod
    def warpgroup_mma(a: SharedMemory, b: SharedMemory, acc: Any, *, use_acc: Any, is_async: bool) -> Product:
        product = Product(a, b, acc, use_acc=bool(use_acc))
        _cta.own("products").append(product)
        return product

    @staticmethod
    def warpgroup_mma_wait(outstanding: int, deps: tuple[Any, ...]) -> Any:
        """Products run here, as late as they may: what their operands have become meanwhile is what they read."""
        queue = _cta.own("products")
        while len(queue) > outstanding:
            with _cta.changed:
                queue.pop(0).run()
        settled = tuple(d.value if isinstance(d, Product) and d.value is not None else d for d in deps)
        return settled if len(settled) > 1 else settled[0]

    @staticmethod
    def fence_async_shared() -> None:
        pass


class Language:
    """`gl` over torch tensors; what is not here, layouts for one, is Gluon's own."""

    int64, float32 = torch.int64, torch.float32
    static_range = range
    exp, abs, where = staticmethod(torch.exp), staticmethod(torch.abs), staticmethod(torch.where)
    split = staticmethod(lambda x: (x[..., 0], x[..., 1]))
    permute = staticmethod(lambda x, order: x.permute(order))
    program_id = staticmethod(lambda axis: _cta.program)
    num_programs = staticmethod(lambda axis: _cta.programs)
    arange = staticmethod(lambda first, end, layout=None: torch.arange(first, end))
    zeros = staticmethod(lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype))
    max = staticmethod(lambda x, axis: x.amax(axis))
    min = staticmethod(lambda x, axis: int(x.amin(axis)))
    maximum = staticmethod(lambda x, y: torch.clamp(x, min=y))
    reshape = staticmethod(lambda x, shape: _value(x).reshape(shape))

    @staticmethod
    def load(pointer: Pointer, mask: Tensor | bool | None = None, other: Any = 0) -> Any:
        if isinstance(mask, bool):  # one for all
            if not mask:
                return _Integer(other) if isinstance(pointer.offset, int) else torch.full_like(pointer.offset, other)
            mask = None
        offset = pointer.offset if mask is None else torch.where(mask, pointer.offset, 0)
        found = pointer.storage[offset]
        if found.dim() == 0 and not found.is_floating_point():
            return _Integer(int(found))
        return found if mask is None else torch.where(mask, found, torch.tensor(other, dtype=found.dtype))

    @staticmethod
    def store(pointer: Pointer, value: Tensor) -> None:
        pointer.storage[pointer.offset] = value

    @staticmethod
    def allocate_shared_memory(dtype: Any, shape: list[int], layout: Any) -> Any:
        if layout == "mbarrier":
            return Barriers(shape[0]) if len(shape) > 1 else Barrier()
        return SharedMemory(torch.full(shape, float("nan")).to(dtype))

    @staticmethod
    def warp_specialize(partitions: list[tuple[Any, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
        def run(function: Any, arguments: tuple[Any, ...]) -> None:
            try:
                function(*arguments)
            except BaseException as error:
                with _cta.changed:
                    _cta.failures.append(error)
                    _cta.changed.notify_all()
            _cta.left()

        _cta.partitions = len(partitions)
        threads = [threading.Thread(target=run, args=partition) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _cta.partitions = 1
        if _cta.failures:
            raise _cta.failures[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(real_language, name)


class _Integer(int):
    """A scalar of the device."""

    def to(self, dtype: Any) -> int:
        return int(self)


MODULES = (warp_specialized, warp_specialized_up, warp_specialized_down)
STAND_INS: dict[str, Any] = {
    "gl": Language(),
    "tma": types.SimpleNamespace(store_wait=store_wait),
    "mbarrier": MBarrier,
    "hopper": Hopper,
    "async_copy": AsyncCopy,
    "max": lambda *values: _Integer(max(values)),
    "min": lambda *values: _Integer(min(values)),
    "sync_warps": lambda: None,
    "load_box": load_box,
    "store_box": store_box,
    "gather_rows": gather_rows,
    "pinned": lambda x: x,
    "join_chain": lambda: None,
    "sigmoid": torch.sigmoid,
}


def simulated(sources: Mapping[str, Callable[[str], str]] | None = None) -> types.SimpleNamespace:
    """The kernels as Python functions over the stand-ins; `sources` rewrites a function's source, to plant a fault."""
    names: dict[str, Any] = dict(STAND_INS)
    for module in MODULES:
        for name, found in vars(module).items():
            if isinstance(found, real_language.constexpr):
                names[name] = found.value
            elif isinstance(found, GluonJITFunction) and name not in names:
                names[name] = types.FunctionType(found.fn.__code__, names, name, found.fn.__defaults__)
    for name, rewrite in (sources or {}).items():
        original = next(vars(module)[name] for module in MODULES if name in vars(module))
        source = original.raw_src if isinstance(original.raw_src, str) else "".join(original.raw_src)
        rewritten = rewrite(source)
        if rewritten == source:
            raise AssertionError(f"the fault changes nothing in {name}")
        code = rewritten[rewritten.index("def ") :]
        exec(compile(f"from __future__ import annotations\n{code}", f"<{name}>", "exec"), names)
    return types.SimpleNamespace(**names)


def run(
    kernel: Callable[..., None], arguments: Mapping[str, Any], *, programs: int, seed: int, timeout_s: float = TIMEOUT_S
) -> None:
    """Run the programs one after another. `arguments`: as of a launch, tensors and descriptors replaced by stand-ins.

    Raises: SimulationError where the kernel breaks a rule.
    """
    global _cta  # noqa: PLW0603 - the stand-ins are called as Triton's, with no CTA among their arguments
    torch.Tensor.expand_dims = torch.Tensor.unsqueeze  # type: ignore[attr-defined]
    for program in range(programs):
        _cta = Cta(program, programs, seed + program, timeout_s)
        try:
            kernel(**arguments)
            _cta.wait_until(_cta.is_idle, "the end")
        finally:
            with _cta.changed:
                _cta.is_done = True
                _cta.pending.clear()
                _cta.changed.notify_all()


def as_stand_ins(arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of a launch for `run`: descriptors over `tensors`, by name; other tensors as pointers."""
    options = {"num_warps", "maxnreg", "launch_pdl"}
    made: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in options:
            continue
        if name in tensors:
            made[name] = Descriptor(tensors[name], value.block_shape)
        elif isinstance(value, Tensor):
            made[name] = Pointer(_storage(value))
        else:
            made[name] = value
    return made


def _storage(tensor: Tensor) -> Tensor:
    """Flat view of a dense tensor in the order of its memory."""
    order = sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))
    return tensor.permute(order).reshape(-1)
