"""Parse the flags that say which layer a command is about, on which GPU, at which numbers of tokens."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from sglang_moe_ext.cli import pasted_log
from sglang_moe_ext.cli.pasted_log import StatedLaunch
from sglang_moe_ext.core import DifferingLayersError, Gpu, GpuError, ModelError, MoEModel, MoEShape, Parallelism
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.missing_config_log import device_of
from sglang_moe_ext.engines.quantization_flag import quantize_as_served
from sglang_moe_ext.engines.registry import ENGINES, SGLANG, VLLM
from sglang_moe_ext.engines.sglang import installation, sharding
from sglang_moe_ext.engines.vllm import installation as vllm_installation
from sglang_moe_ext.engines.vllm import sharding as vllm_sharding
from sglang_moe_ext.gpu import memory, specs
from sglang_moe_ext.gpu.decoder_roofline import Surroundings, surroundings_of
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.models import parse_dtype_flag, parse_shape, resolve
from sglang_moe_ext.models.checkpoint_names import NameMatch, match_name

MOST_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True)
class LayerArgs:
    """The layer that the flags mean.

    `vllm_shape` is the layer in vLLM, where it has one; `device_name` comes from a log line. `moe_layers` is None where
    the number of layers is not known. `notes` are lines for the user. `line_engine`: the engine whose line was pasted.
    `surroundings`: the rest of the model, None where it is not known.
    """

    name: str
    shape: MoEShape
    architecture: str = ""
    vllm_shape: MoEShape | None = None
    device_name: str | None = None
    moe_layers: int | None = None
    notes: tuple[str, ...] = ()
    line_engine: EngineName | None = None
    surroundings: Surroundings | None = None


def names_a_layer(arguments: argparse.Namespace) -> bool:
    """True where the flags name a layer at all."""
    return any((arguments.model, arguments.shape, arguments.from_log))


def parse_layer(arguments: argparse.Namespace) -> LayerArgs:
    """The layer that the flags mean. Sets `arguments.engine` where no flag did.

    Raises:
        MoEExtError: they name none, several, or an impossible one.
    """
    if not names_a_layer(arguments) or (arguments.shape and (arguments.model or arguments.from_log)):
        raise ModelError("expected exactly one of --model, --shape and --from-log; --model GLM-4.7-Flash is an example")
    if arguments.from_log:
        layer = _parse_log(arguments)
    elif arguments.shape:
        layer = _parse_stated_shape(arguments)
    elif _fill_engine(arguments, None) == VLLM.NAME:
        layer = _parse_model_for_vllm(arguments)
    else:
        layer = _parse_model(arguments)
    for note in layer.notes:
        print(f"note: {note}")
    return layer


def _fill_engine(arguments: argparse.Namespace, of_line: EngineName | None) -> EngineName:
    """The engine of --engine, else of the pasted line, else SGLang, as for commands without that flag."""
    engine: EngineName = getattr(arguments, "engine", None) or of_line or SGLANG.NAME
    arguments.engine = engine
    return engine


def _parse_stated_shape(arguments: argparse.Namespace) -> LayerArgs:
    _refuse_flags(arguments, ("--tp-size", "--ep-size", "--ep-num-redundant-experts", *_OF_CHECKPOINTS), "--shape")
    _fill_engine(arguments, None)
    shape = parse_shape(arguments.shape)
    return LayerArgs(str(shape), shape)


_OF_CHECKPOINTS = (
    "--dtype",
    "--quantization",
    "--per-channel-quant",
    "--disable-shared-experts-fusion",
    "--enable-expert-parallel",
    "--model-prefix",
)


def _refuse_flags(arguments: argparse.Namespace, flags: tuple[str, ...], beside: str) -> None:
    """Refuse flags that have nothing left to say: --shape and a table's name state the layer as a rank has it."""
    for flag in flags:
        value = getattr(arguments, flag.removeprefix("--").replace("-", "_"), None)
        if value not in (None, False, "auto"):
            raise ModelError(
                f"{flag} does not go with {beside}, which states the layer of one rank, as in "
                "--shape E=65,N=1536,K=2048,topk=5,dtype=fp8_w8a8,per_channel_quant=True: leave it out, or use --model"
            )


def shape_of_kind(arguments: argparse.Namespace, kind: int) -> MoEShape:
    """The layer of that kind on one rank, where the layers of --model differ.

    Raises:
        ModelError: it cannot be split as the flags say.
    """
    one = argparse.Namespace(**{**vars(arguments), "layer_kind": kind})
    return (_parse_model_for_vllm if _fill_engine(one, None) == VLLM.NAME else _parse_model)(one).shape


def _find_model(arguments: argparse.Namespace) -> MoEModel:
    """The model, or the kind of its layers that `layer_kind` counts where they differ."""
    try:
        return resolve(
            arguments.model,
            trust_remote_code=arguments.trust_remote_code,
            section=getattr(arguments, "model_prefix", None),
        )
    except DifferingLayersError as differing:
        kind: int | None = getattr(arguments, "layer_kind", None)
        if kind is None:
            raise
        return differing.models[kind]


def _resolve(arguments: argparse.Namespace) -> MoEModel:
    found = _find_model(arguments)
    quantization = parse_dtype_flag(
        arguments.dtype, checkpoint=found.quantization, per_channel=arguments.per_channel_quant
    )
    is_stated = arguments.dtype != "auto" or arguments.per_channel_quant
    model = replace(found, quantization=quantization, older_readings=() if is_stated else found.older_readings)
    if arguments.dtype in ("fp16", "float16"):
        model = replace(model, dtype="float16")
    return model


def _as_served(model: MoEModel, arguments: argparse.Namespace, engine: EngineName) -> MoEModel:
    """The model as the server's --quantization makes that engine run it."""
    if arguments.quantization is not None and arguments.dtype != "auto":
        raise ModelError("--quantization does not go with --dtype: both say how the weights are stored")
    version = _vllm_version() if engine == VLLM.NAME else _engine_version()
    return quantize_as_served(model, arguments.quantization, engine, version)


def _notes_on(model: MoEModel, argument: str) -> tuple[str, ...]:
    """What was concluded from a checkpoint's name, where no config.json was read."""
    match = match_name(argument)
    inferred = isinstance(match, NameMatch) and not match.is_exact and match.model.name == model.name
    return (match.note,) if inferred and isinstance(match, NameMatch) and match.model.source == model.source else ()


def _parallelism(arguments: argparse.Namespace) -> Parallelism:
    tp, ep = arguments.tp_size, arguments.ep_size
    return Parallelism(1 if tp is None else tp, 1 if ep is None else ep)


def _with_redundant(model: MoEModel, arguments: argparse.Namespace, parallelism: Parallelism) -> MoEModel:
    """Redundant experts are further copies of routed ones: the engines add them before they split by expert."""
    redundant: int = arguments.ep_num_redundant_experts
    if redundant == 0:
        return model
    if redundant < 0 or parallelism.ep == 1:
        raise ModelError(
            f"--ep-num-redundant-experts {redundant}: expected a positive number beside an --ep-size above 1"
        )
    if (model.routed_experts + redundant) % parallelism.ep:
        raise ModelError(
            f"{model.name} has {model.routed_experts} experts, and {redundant} redundant ones make a number that "
            f"--ep-size {parallelism.ep} does not divide"
        )
    return replace(model, routed_experts=model.routed_experts + redundant)


def _parse_model_for_vllm(arguments: argparse.Namespace) -> LayerArgs:
    """vLLM fuses no shared experts, and with expert parallelism splits them over all ranks."""
    model, stated = _as_served(_resolve(arguments), arguments, VLLM.NAME), _parallelism(arguments)
    ranks = stated.tp
    if stated.ep not in (1, ranks):
        raise ModelError(f"--ep-size {stated.ep}: vLLM splits experts over all {ranks} ranks, or not at all")
    parallelism = Parallelism(ranks, ranks if getattr(arguments, "enable_expert_parallel", False) else stated.ep)
    split = _with_redundant(model, arguments, parallelism)
    shape = vllm_sharding.launched_shape(split, parallelism, engine_version=_vllm_version())
    notes = _notes_on(model, arguments.model)
    around = surroundings_of(model, parallelism.tp)
    return LayerArgs(
        model.name, shape, model.architecture, shape, moe_layers=model.moe_layers, notes=notes, surroundings=around
    )


def _parse_model(arguments: argparse.Namespace) -> LayerArgs:
    if getattr(arguments, "enable_expert_parallel", False):
        raise ModelError("--enable-expert-parallel is vLLM's flag: say --ep-size, or --engine vllm")
    found, parallelism = _resolve(arguments), _parallelism(arguments)
    model = _as_served(found, arguments, SGLANG.NAME)
    shape = sharding.launched_shape(
        _with_redundant(model, arguments, parallelism),
        parallelism,
        engine_version=_engine_version(),
        fuse_shared_experts=not arguments.disable_shared_experts_fusion,
    )
    return LayerArgs(
        model.name,
        shape,
        model.architecture,
        _vllm_shape_beside(found, arguments, parallelism),
        moe_layers=model.moe_layers,
        notes=_notes_on(found, arguments.model),
        surroundings=surroundings_of(model, parallelism.tp),
    )


def _vllm_shape_beside(model: MoEModel, arguments: argparse.Namespace, parallelism: Parallelism) -> MoEShape | None:
    """The same launch in vLLM; None where it refuses the flags."""
    try:
        served = _as_served(model, arguments, VLLM.NAME)
    except ModelError:
        return None
    return _vllm_shape(_with_redundant(served, arguments, parallelism), parallelism)


def _vllm_shape(model: MoEModel, parallelism: Parallelism) -> MoEShape | None:
    try:
        return vllm_sharding.launched_shape(model, parallelism, engine_version=_vllm_version())
    except ModelError:
        return None


def _engine_version() -> tuple[int, int, int]:
    engine = installation.find()
    return sharding.NEWEST if engine is None else engine.version


def _vllm_version() -> tuple[int, int, int]:
    engine = vllm_installation.find()
    return vllm_sharding.NEWEST if engine is None else engine.version


def _parse_log(arguments: argparse.Namespace) -> LayerArgs:
    _refuse_flags(arguments, _OF_CHECKPOINTS, "--from-log")
    chosen = pasted_log.choose_launch(
        pasted_log.read_text(arguments.from_log),
        StatedLaunch(
            model=_resolve(arguments) if arguments.model else None,
            tp=arguments.tp_size,
            ep=arguments.ep_size,
            redundant_experts=arguments.ep_num_redundant_experts,
            engine=getattr(arguments, "engine", None),
        ),
        {"sglang": _engine_version(), "vllm": _vllm_version()},
    )
    guess = chosen.guess
    _fill_engine(arguments, guess.engine)
    is_for_vllm = guess.engine == VLLM.NAME
    return LayerArgs(
        guess.model.name,
        guess.shape,
        guess.model.architecture,
        guess.shape if is_for_vllm else _vllm_shape(guess.model, guess.parallelism),
        device_of(chosen.key),
        guess.model.moe_layers,
        chosen.notes,
        guess.engine,
        surroundings_of(guess.model, guess.parallelism.tp),
    )


def print_memory_note(layer: LayerArgs, gpu: Gpu) -> None:
    """Say so where the experts of one rank cannot lie in the memory of the GPU."""
    why = memory.why_too_large(layer.shape, gpu, layer.moe_layers)
    if why is not None:
        print(f"note: {layer.name}: {why}")


def gpu_of(arguments: argparse.Namespace, layer: LayerArgs) -> tuple[Gpu, bool]:
    """(The GPU that is meant, whether this machine has it).

    Raises:
        GpuError: none is named, and there is none here; or it is unknown.
    """
    wanted = arguments.gpu or layer.device_name
    try:
        here = specs.detect()
    except GpuError:
        if wanted is None:
            raise
        here = None  # an unknown GPU here does not matter for another one
    if wanted is None:
        if here is None:
            raise GpuError("this machine has no GPU: name the one that is meant, such as --gpu RTX_4090 or --gpu H200")
        return here, True
    if here is not None and wanted in (here.device_name, here.device_name.replace(" ", "_")):
        return here, True
    gpu = find_gpu(wanted)
    return gpu, here is not None and here.device_name == gpu.device_name


def tokens_of(arguments: argparse.Namespace, default: tuple[int, ...]) -> tuple[int, ...]:
    """The batch sizes, in order and once each.

    Raises:
        ModelError: one of them is impossible.
    """
    tokens: list[int] = arguments.batch_size or list(default)
    wrong = next((m for m in tokens if not 1 <= m <= MOST_TOKENS), None)
    if wrong is not None:
        raise ModelError(f"--batch-size {wrong}: expected numbers of tokens from 1 to {MOST_TOKENS}")
    return tuple(sorted(set(tokens)))


class _ListGpus(argparse.Action):
    """Print the GPUs that --gpu knows, and end."""

    def __init__(self, option_strings: list[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the GPUs that --gpu knows, and end")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for gpu in specs.known_gpus().values():
            size = "" if gpu.memory_gib is None else f", {gpu.memory_gib:g} GiB"
            print(f"{gpu.device_name.replace(' ', '_')}  ({gpu.target}{size})")
        print("and MIG slices of them, such as NVIDIA_A100-SXM4-80GB_MIG_3g.40gb")
        parser.exit()


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the flags; those that upstream's tuning scripts have keep their names and meaning."""
    what = parser.add_argument_group("which layer")
    what.add_argument("--model", help="a built-in name, a folder with config.json, or a hub id")
    what.add_argument("--shape", help="its numbers: E=65,N=1536,K=2048,topk=5[,dtype=fp8_w8a8][,block_shape=[128,128]]")
    what.add_argument(
        "--from-log",
        metavar="TEXT",
        help="the server's warning about the missing table, as pasted, or the name of its log; --model, --tp-size and "
        "--ep-size decide where several launches fit",
    )
    what.add_argument(
        "--tp-size",
        "--tp",
        "-tp",
        "--tensor-parallel-size",
        type=int,
        help="tensor-parallel size of the server (default 1)",
    )
    what.add_argument("--ep-size", "--ep", type=int, help="expert-parallel size of the server (default 1)")
    what.add_argument(
        "--ep-num-redundant-experts",
        type=int,
        default=0,
        metavar="N",
        help="redundant experts of the server, as its flag of that name (default 0)",
    )
    what.add_argument(
        "--dtype",
        default="auto",
        help="auto (the checkpoint's), bf16, fp16, fp8_w8a8, int8_w8a8, int8_w8a16 or int4_w4a16",
    )
    what.add_argument(
        "--quantization",
        metavar="NAME",
        help="the server's flag of that name, such as moe_wna16, by which AWQ and GPTQ run Triton",
    )
    what.add_argument("--per-channel-quant", action="store_true", help="one scale for each output channel")
    what.add_argument("--disable-shared-experts-fusion", action="store_true", help="as the server's flag of that name")
    what.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code of the model's folder (default: never)"
    )
    what.add_argument("--gpu", help="the GPU that is meant, such as RTX_4090 (default: the GPU of this machine)")
    what.add_argument("--list-gpus", action=_ListGpus)
    what.add_argument("--batch-size", type=int, nargs="+", metavar="M", help="numbers of tokens (default: 1 to 16384)")


def add_engine_to(parser: argparse.ArgumentParser) -> None:
    """Add --engine, and the flags that only vLLM's tuning script has."""
    whose = parser.add_argument_group("whose layer")
    whose.add_argument(
        "--engine",
        choices=tuple(ENGINES),
        help="the engine to tune (default: that of the pasted line, else the one installed, else sglang)",
    )
    whose.add_argument(
        "--enable-expert-parallel",
        "-enable-ep",
        action="store_true",
        help="vLLM: each of the --tp-size ranks has whole experts",
    )
    whose.add_argument("--model-prefix", metavar="NAME", help="the section of config.json that describes the experts")
