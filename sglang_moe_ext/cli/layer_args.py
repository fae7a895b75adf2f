"""The layer that the flags of a command name: a model, a shape, or a line of a log."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from sglang_moe_ext.cli import pasted_log
from sglang_moe_ext.cli.pasted_log import StatedLaunch
from sglang_moe_ext.core import DifferingLayersError, ModelError, MoEModel, MoEShape, Parallelism
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.missing_config_log import device_of
from sglang_moe_ext.engines.quantization_flag import quantize_as_served
from sglang_moe_ext.engines.registry import SGLANG, VLLM
from sglang_moe_ext.engines.sglang import installation, sharding
from sglang_moe_ext.engines.vllm import installation as vllm_installation
from sglang_moe_ext.engines.vllm import sharding as vllm_sharding
from sglang_moe_ext.gpu.decoder_roofline import Surroundings, surroundings_of
from sglang_moe_ext.models import parse_dtype_flag, parse_shape, resolve
from sglang_moe_ext.models.checkpoint_names import NameMatch, match_name


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
