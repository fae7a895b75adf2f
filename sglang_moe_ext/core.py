"""The dataclasses that every part of the project shares, and the errors that users see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sglang_moe_ext.schemes import Scales, SchemeRow, find_row
from sglang_moe_ext.schemes import Scheme as Scheme  # noqa: PLC0414 (exported)

ActivationDtype = Literal["bfloat16", "float16"]
CheckpointDtype = Literal["bfloat16", "float16", "float32"]
"""Engines serve a checkpoint in float32 in one of 16 bits; which one is theirs to choose."""
Projection = Literal["up", "down"]
Origin = Literal["measured", "transferred", "predicted"]
"""How an entry came to be: timed on the GPU it is for, timed there in another engine, or ranked by a model of the GPU.

In the order of their worth: what is worth less never replaces what is worth more.
"""

PROJECTIONS: tuple[Projection, ...] = ("up", "down")


class MoEExtError(Exception):
    """An error that a user can act on: one line with the culprit, what was expected, and the next step."""


class ModelError(MoEExtError):
    """The model is unknown, unreadable, dense, or cannot be split as asked."""


class DifferingLayersError(ModelError):
    """The MoE layers of the model differ, where one was expected. `models`: the model with each kind of layer alone."""

    def __init__(self, message: str, models: tuple[MoEModel, ...]) -> None:
        super().__init__(message)
        self.models = models


class GpuError(MoEExtError):
    """The GPU is unknown, or not on this machine."""


class TableError(MoEExtError):
    """A table of configurations is not one: broken JSON, a bad key, an impossible value."""


class StoreError(MoEExtError):
    """A table could not be written or read where it belongs."""


class EngineError(MoEExtError):
    """The engine is missing, unsupported, or did not do what it was asked."""


@dataclass(frozen=True, slots=True)
class CheckpointFormat:
    """What a checkpoint says of its quantized experts beyond the scheme: engines choose a backend by it.

    `method` as config.json names it, in lower case with underscores. `group` is the stored group size, before a split
    makes an engine halve it.
    """

    method: str
    bits: int = 8
    group: int | None = None
    symmetric: bool = True
    activation_order: bool = False


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the expert weights are stored. No scheme: they are not quantized.

    `block_shape` is (N, K) of the weights that share one scale; (0, group) for groups along K alone. `checkpoint` takes
    no part in comparisons: kernels and tables do not depend on it. It is None where a user stated the layer.
    """

    scheme: Scheme | None = None
    block_shape: tuple[int, int] | None = None
    per_channel: bool = False
    checkpoint: CheckpointFormat | None = field(default=None, compare=False)

    @property
    def row(self) -> SchemeRow:
        """The facts of its scheme."""
        return find_row(self.scheme)

    @property
    def scales(self) -> Scales:
        """What one scale covers."""
        if self.scheme is None:
            return "none"
        if self.block_shape is not None:
            return "block" if self.is_block_wise else "group"
        return "channel" if self.per_channel else "tensor"

    @property
    def weight_bits(self) -> int:
        """Bits of one weight."""
        return self.row.weight_bits

    @property
    def activation_bits(self) -> int:
        """Bits of one activation as the GEMM reads it."""
        return self.row.activation_bits

    @property
    def is_block_wise(self) -> bool:
        """True where one scale covers a two-dimensional block of weights."""
        return self.block_shape is not None and all(self.block_shape)

    def __str__(self) -> str:
        if self.scheme is None:
            return "not quantized"
        if self.block_shape is not None:
            return f"{self.scheme} {self.scales} {list(self.block_shape)}"
        return f"{self.scheme} per {self.scales}"


@dataclass(frozen=True, slots=True)
class OlderReading:
    """What SGLang before that release makes of a checkpoint that newer ones read as its config.json means."""

    before: tuple[int, int, int]
    quantization: Quantization


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The layers around the experts of a whole model, for an estimate of their time; widths in elements.

    `layers` counts those without experts too, which have a dense MLP of `dense_width`; `shared_width` is that of all
    shared experts of a layer. `query_dim` and `value_dim` are of one head. `latent_dim`, and `query_rank` where the
    queries have one as well: keys and values are kept as one vector of so many elements and `rope_dim` more (MLA).
    `windowed_layers` see no more than `window` tokens back.
    """

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    query_dim: int
    value_dim: int
    latent_dim: int = 0
    query_rank: int = 0
    rope_dim: int = 0
    dense_width: int = 0
    shared_width: int = 0
    windowed_layers: int = 0
    window: int = 0


@dataclass(frozen=True, slots=True)
class MoEModel:
    """The experts of a checkpoint, as its config.json states them: before an engine fuses, shards or pads.

    `zero_experts` are choices of the router that have no weights. `older_readings` are in the order of releases.
    `decoder` is None where its attention is of a kind that is not estimated, or not stated.
    """

    name: str
    architecture: str
    routed_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    shared_experts: int = 0
    gated: bool = True
    quantization: Quantization = field(default_factory=Quantization)
    dtype: CheckpointDtype = "bfloat16"
    source: str = ""
    zero_experts: int = 0
    older_readings: tuple[OlderReading, ...] = ()
    moe_layers: int | None = None
    decoder: DecoderShape | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How a server splits the experts; tp is the whole tensor-parallel world, of which ep ranks split by expert."""

    tp: int = 1
    ep: int = 1

    @property
    def moe_tp(self) -> int:
        """Ranks that share one expert's intermediate size."""
        return self.tp // self.ep


@dataclass(frozen=True, slots=True)
class MoEShape:
    """One MoE layer as one rank launches it.

    w1 is [experts, 2 * intermediate_size, hidden_size] ([experts, intermediate_size, hidden_size] when not gated),
    w2 is [experts, hidden_size, intermediate_size]; `experts` and `top_k` include the `fused_shared` experts, which lie
    last and which every token takes. `zero_experts` are ids behind the routed ones that a router may give and that
    compute nothing. float32 is of a grouped GEMM alone: no engine launches a layer in it.
    """

    experts: int
    intermediate_size: int
    hidden_size: int
    top_k: int
    quantization: Quantization = field(default_factory=Quantization)
    dtype: CheckpointDtype = "bfloat16"
    gated: bool = True
    ep: int = 1
    fused_shared: int = 0
    zero_experts: int = 0

    def gemm(self, projection: Projection) -> tuple[int, int]:
        """(N, K) of one expert's GEMM: output columns and reduction length."""
        if projection == "up":
            return self.intermediate_size * (2 if self.gated else 1), self.hidden_size
        return self.hidden_size, self.intermediate_size

    def __str__(self) -> str:
        """As --shape takes it; what that cannot say, the kernel does not see."""
        quantization = self.quantization
        return "".join(
            (
                f"E={self.experts},N={self.intermediate_size},K={self.hidden_size},topk={self.top_k}",
                f",dtype={quantization.scheme or self.dtype}",
                f",block_shape={list(quantization.block_shape)}" if quantization.block_shape else "",
                ",per_channel_quant=True" if quantization.per_channel else "",
                "" if self.gated else ",gated=False",
            )
        )


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """An architecture that kernels are compiled for: NVIDIA's compute capability, or AMD's name such as gfx942.

    One of the two is given. `sm` of an AMD GPU is 0, less than any compute capability: a question for a feature of
    NVIDIA's GPUs from some `sm` on is answered no.
    """

    sm: int = 0
    gfx: str = ""

    @property
    def is_amd(self) -> bool:
        return bool(self.gfx)

    @property
    def lanes(self) -> int:
        """Threads of a warp, which AMD calls a wave."""
        return 64 if self.is_amd else 32

    @property
    def fp8_dtype(self) -> str:
        """torch's name of the 8-bit float that the engines store for it: gfx942 multiplies one of another bias."""
        return "float8_e4m3fnuz" if self.gfx == "gfx942" else "float8_e4m3fn"

    def __str__(self) -> str:
        return self.gfx or f"sm_{self.sm}"


@dataclass(frozen=True, slots=True, order=True)
class CompileKey:
    """What of a configuration decides what its binary needs: GROUP_SIZE_M changes neither registers nor memory."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    use_tma: bool = False
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0
    kpack: int = 1

    def with_group(self, group_m: int) -> TileConfig:
        """The configuration of this binary with that GROUP_SIZE_M."""
        return TileConfig(
            self.block_m,
            self.block_n,
            self.block_k,
            group_m,
            self.num_warps,
            self.num_stages,
            self.use_tma,
            self.waves_per_eu,
            self.matrix_instr_nonkdim,
            self.kpack,
        )


@dataclass(frozen=True, slots=True, order=True)
class TileConfig:
    """One configuration of the fused-MoE kernel; field by field the engine's BLOCK_SIZE_M ... num_stages, USE_TMA.

    The last three are options of Triton for AMD GPUs alone: how many waves of a SIMD the compiler aims at (0: as it
    likes), rows and columns of one matrix instruction (0: as it likes), and how many operands one load from the LDS
    brings. Their defaults are Triton's, and an entry that names none means them.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    use_tma: bool = False
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0
    kpack: int = 1

    @property
    def compile_key(self) -> CompileKey:
        return CompileKey(
            self.block_m,
            self.block_n,
            self.block_k,
            self.num_warps,
            self.num_stages,
            self.use_tma,
            self.waves_per_eu,
            self.matrix_instr_nonkdim,
            self.kpack,
        )

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k} G{self.group_m} w{self.num_warps} s{self.num_stages}"
        options = (
            " TMA" if self.use_tma else "",
            f" e{self.waves_per_eu}" if self.waves_per_eu else "",
            f" i{self.matrix_instr_nonkdim}" if self.matrix_instr_nonkdim else "",
            f" k{self.kpack}" if self.kpack != 1 else "",
        )
        return f"{tile}{''.join(options)}"


Table = dict[int, TileConfig]
"""The engine's table: number of tokens M -> configuration. The engine takes the entry whose M is nearest."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a kernel can rely on. Bandwidth in GB/s, dense rates in TFLOP/s; `device_name` as torch.cuda reports it.

    Of an AMD GPU a multiprocessor is a compute unit, and shared memory its LDS. `memory_gib` is at least what a process
    can have; None where it is not known.
    """

    device_name: str
    target: Target
    multiprocessors: int
    smem_per_block: int
    smem_per_multiprocessor: int
    bandwidth_gbs: float
    bf16_tflops: float
    fp8_tflops: float | None
    l2_mib: float
    source: str
    memory_gib: float | None = None

    @property
    def sm(self) -> int:
        """Its compute capability without the dot; 0 of an AMD GPU."""
        return self.target.sm

    def tflops(self, activation_bits: int) -> float:
        """Dense rate of the matrix units for operands of that width."""
        return self.fp8_tflops if activation_bits == 8 and self.fp8_tflops is not None else self.bf16_tflops


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel needs: dynamic shared memory a block, registers a thread, spilled bytes a thread.

    On AMD GPUs the registers are vector registers, accumulation registers among them.
    """

    smem_bytes: int
    registers: int
    spill_bytes: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a candidate is out: the class of the error and its message."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class TableKey:
    """What an engine's file name says: which layer of which model on which GPU a table is for.

    `intermediate_size` is the N of the name, which an engine may state packed; `block_shape` only where both sides are
    set, as the names have it; `down` marks a table for the down projection alone.
    """

    experts: int
    intermediate_size: int
    device_name: str
    scheme: Scheme | None = None
    block_shape: tuple[int, int] | None = None
    per_channel: bool = False
    down: bool = False


@dataclass(frozen=True, slots=True)
class CompileJob:
    """One binary to make: this GEMM of this layer, launched for `tokens` tokens with this key, for this architecture.

    GROUP_SIZE_M is a constant of the engine's kernel, which changes nothing that a binary needs: `group_m` None is the
    binary that takes it as an argument. `sorted_rows`: the up GEMM writes its rows in the order of the experts, as a
    down GEMM with TMA wants them.
    """

    shape: MoEShape
    projection: Projection
    tokens: int
    key: CompileKey
    target: Target
    group_m: int | None = None
    sorted_rows: bool = False
