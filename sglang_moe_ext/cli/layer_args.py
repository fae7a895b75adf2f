"""What the flags of `layer_flags` mean: which layer a command is about, on which GPU, at which numbers of tokens."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from sglang_moe_ext.core import Gpu, GpuError, ModelError, MoEModel, MoEShape, Parallelism
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.registry import ENGINES, SGLANG, VLLM
from sglang_moe_ext.engines.sglang import installation, missing_config_log, sharding
from sglang_moe_ext.engines.vllm import installation as vllm_installation
from sglang_moe_ext.engines.vllm import sharding as vllm_sharding
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.models import builtin_models, parse_dtype_flag, parse_shape, resolve

MOST_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True)
class LayerArgs:
    """The layer that the flags mean; `vllm_shape` as vLLM has it, `device_name` where a log line had one."""

    name: str
    shape: MoEShape
    architecture: str = ""
    vllm_shape: MoEShape | None = None
    device_name: str | None = None


def names_a_layer(arguments: argparse.Namespace) -> bool:
    """True where the flags name a layer at all."""
    return any((arguments.model, arguments.shape, arguments.from_log))


def parse_layer(arguments: argparse.Namespace) -> LayerArgs:
    """The layer that the flags mean.

    Raises:
        MoEExtError: they name none, several, or an impossible one.
    """
    if sum(map(bool, (arguments.model, arguments.shape, arguments.from_log))) != 1:
        raise ModelError("expected exactly one of --model, --shape and --from-log; --model GLM-4.7-Flash is an example")
    if not arguments.model:
        _refuse_flags_of_models(arguments)
    is_for_vllm = _engine_of(arguments) == VLLM.NAME
    if arguments.from_log:
        if is_for_vllm:
            raise ModelError("--from-log reads SGLang's warning alone: name the model with --model, or --shape")
        return _from_log(arguments.from_log)
    if arguments.shape:
        shape = parse_shape(arguments.shape)
        return LayerArgs(str(shape), shape)
    return _of_model_in_vllm(arguments) if is_for_vllm else _of_model(arguments)


def _engine_of(arguments: argparse.Namespace) -> EngineName:
    """SGLang for the commands that know no other."""
    engine: EngineName = getattr(arguments, "engine", SGLANG.NAME)
    return engine


def _refuse_flags_of_models(arguments: argparse.Namespace) -> None:
    """--shape and --from-log state the layer as a rank has it, so nothing is left for these flags to say."""
    given = {
        "--tp-size": arguments.tp_size != 1,
        "--ep-size": arguments.ep_size != 1,
        "--dtype": arguments.dtype != "auto",
        "--per-channel-quant": arguments.per_channel_quant,
        "--disable-shared-experts-fusion": arguments.disable_shared_experts_fusion,
        "--enable-expert-parallel": getattr(arguments, "enable_expert_parallel", False),
        "--model-prefix": getattr(arguments, "model_prefix", None),
    }
    useless = next((flag for flag, is_given in given.items() if is_given), None)
    if useless:
        raise ModelError(
            f"{useless} goes with --model alone: state the layer of one rank, as in "
            "--shape E=65,N=1536,K=2048,topk=5,dtype=fp8_w8a8,per_channel_quant=True"
        )


def _model(arguments: argparse.Namespace) -> MoEModel:
    found = resolve(
        arguments.model,
        trust_remote_code=arguments.trust_remote_code,
        section=getattr(arguments, "model_prefix", None),
    )
    quantization = parse_dtype_flag(
        arguments.dtype, checkpoint=found.quantization, per_channel=arguments.per_channel_quant
    )
    is_stated = arguments.dtype != "auto" or arguments.per_channel_quant
    model = replace(found, quantization=quantization, older_readings=() if is_stated else found.older_readings)
    if arguments.dtype in ("fp16", "float16"):
        model = replace(model, dtype="float16")
    return model


def _of_model_in_vllm(arguments: argparse.Namespace) -> LayerArgs:
    """vLLM fuses no shared experts, and with expert parallelism splits them over all ranks."""
    model, ranks = _model(arguments), arguments.tp_size
    if arguments.ep_size not in (1, ranks):
        raise ModelError(f"--ep-size {arguments.ep_size}: vLLM splits experts over all {ranks} ranks, or not at all")
    ep = ranks if arguments.enable_expert_parallel else arguments.ep_size
    shape = vllm_sharding.launched_shape(model, Parallelism(ranks, ep), engine_version=_vllm_version())
    return LayerArgs(model.name, shape, model.architecture, shape)


def _of_model(arguments: argparse.Namespace) -> LayerArgs:
    if getattr(arguments, "enable_expert_parallel", False):
        raise ModelError("--enable-expert-parallel is vLLM's flag: say --ep-size, or --engine vllm")
    model = _model(arguments)
    parallelism = Parallelism(arguments.tp_size, arguments.ep_size)
    shape = sharding.launched_shape(
        model,
        parallelism,
        engine_version=_engine_version(),
        fuse_shared_experts=not arguments.disable_shared_experts_fusion,
    )
    return LayerArgs(model.name, shape, model.architecture, _vllm_shape(model, parallelism))


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


def _from_log(line: str) -> LayerArgs:
    key = missing_config_log.missing_table(line)
    guesses = missing_config_log.guess_launches(key, builtin_models().values(), _engine_version())
    layers = {replace(guess.shape, ep=1, fused_shared=0) for guess in guesses}
    if len(layers) == 1:
        guess = guesses[0]
        vllm_shape = _vllm_shape(guess.model, guess.parallelism)
        device_name = missing_config_log.device_of(key)
        return LayerArgs(guess.model.name, guess.shape, guess.model.architecture, vllm_shape, device_name)
    if layers:
        names = ", ".join(guess.model.name for guess in guesses)
        raise ModelError(f"--from-log: several models ask for that table ({names}): name yours with --model")
    raise ModelError(
        f"--from-log: no built-in model asks for a table of E={key.experts}, N={key.intermediate_size}, and the line "
        "does not say its hidden size and top-k: "
        f"add them with --shape E={key.experts},N={key.intermediate_size},K=...,topk=..."
    )


def gpu_of(arguments: argparse.Namespace, layer: LayerArgs) -> tuple[Gpu, bool]:
    """(the GPU that is meant, whether this machine has it).

    Raises:
        GpuError: none is named, and there is none here; or it is unknown.
    """
    wanted = arguments.gpu or layer.device_name
    try:
        here = specs.detect()
    except GpuError:
        if wanted is None:
            raise
        here = None  # a GPU that we know nothing of does not stand in the way of another
    if wanted is None:
        if here is None:
            raise GpuError("this machine has no GPU: name the one that is meant, such as --gpu RTX_4090 or --gpu H200")
        return here, True
    if here is not None and wanted in (here.device_name, here.device_name.replace(" ", "_")):
        return here, True
    gpu = specs.find(wanted)
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


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the flags; those that upstream's tuning scripts have keep their names and meaning."""
    what = parser.add_argument_group("which layer")
    what.add_argument("--model", help="a built-in name, a folder with config.json, or a hub id")
    what.add_argument("--shape", help="its numbers: E=65,N=1536,K=2048,topk=5[,dtype=fp8_w8a8][,block_shape=[128,128]]")
    what.add_argument("--from-log", metavar="LINE", help="the server's own warning about the missing table, pasted")
    what.add_argument(
        "--tp-size",
        "--tp",
        "-tp",
        "--tensor-parallel-size",
        type=int,
        default=1,
        help="tensor-parallel size of the server (default 1)",
    )
    what.add_argument("--ep-size", "--ep", type=int, default=1, help="expert-parallel size of the server (default 1)")
    what.add_argument(
        "--dtype",
        default="auto",
        help="auto (the checkpoint's), bf16, fp16, fp8_w8a8, int8_w8a8, int8_w8a16 or int4_w4a16",
    )
    what.add_argument("--per-channel-quant", action="store_true", help="one scale for each output channel")
    what.add_argument("--disable-shared-experts-fusion", action="store_true", help="as the server's flag of that name")
    what.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model's folder brings (default: never)"
    )
    what.add_argument("--gpu", help="the GPU that is meant, such as RTX_4090 (default: this machine's)")
    what.add_argument("--batch-size", type=int, nargs="+", metavar="M", help="numbers of tokens (default: 1 to 16384)")


def add_engine_to(parser: argparse.ArgumentParser) -> None:
    """Add --engine, and the flags that only vLLM's tuning script has."""
    whose = parser.add_argument_group("whose layer")
    whose.add_argument(
        "--engine", choices=tuple(ENGINES), default=SGLANG.NAME, help="the engine that is tuned (default sglang)"
    )
    whose.add_argument(
        "--enable-expert-parallel",
        "-enable-ep",
        action="store_true",
        help="vLLM: experts lie on the ranks of --tp-size, each whole",
    )
    whose.add_argument("--model-prefix", metavar="NAME", help="the section of config.json that describes the experts")
