"""The Python interface: resolve a model to its MoE layer, weigh, predict or measure its tables, look up, install.

These seven functions, and the types that they take and give, are the public Python interface of this package; the
command line calls them. Everything else may change between releases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_moe_ext.core import EngineError, Gpu, GpuError, ModelError, MoEModel, MoEShape, Parallelism
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.engines.sglang import installation, sharding
from sglang_moe_ext.engines.sglang import lookup_probe as sglang_lookup_probe
from sglang_moe_ext.engines.vllm import lookup_probe as vllm_lookup_probe
from sglang_moe_ext.engines.vllm import sharding as vllm_sharding
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.gpu.decoder_roofline import Surroundings, surroundings_of
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.models import parse_dtype_flag
from sglang_moe_ext.models import resolve as resolve_model
from sglang_moe_ext.stock import reinstall
from sglang_moe_ext.stock.reinstall import Reinstalled
from sglang_moe_ext.tuning import pipeline, worth_verdict
from sglang_moe_ext.tuning import weigh as weighing
from sglang_moe_ext.tuning.bench import routing
from sglang_moe_ext.tuning.install_target import Install
from sglang_moe_ext.tuning.pipeline import TuneOutcome
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.request import MeasureOptions, Progress, TuneRequest
from sglang_moe_ext.tuning.run import executor
from sglang_moe_ext.tuning.search.screening import EffortName
from sglang_moe_ext.tuning.tune_plan import DEFAULT_TOKENS
from sglang_moe_ext.tuning.worth import DECODE_CONTEXT, Worth

__all__ = ["Layer", "install", "lookup", "measure", "predict", "resolve", "verdict", "weigh"]

_AS_SERVED = {"sglang": sglang_lookup_probe.AS_SERVED, "vllm": vllm_lookup_probe.AS_SERVED}
_ALONE = {"sglang": sglang_lookup_probe.ALONE, "vllm": vllm_lookup_probe.ALONE}


@dataclass(frozen=True, slots=True)
class Layer:
    """The MoE layer of a model as one rank of one engine launches it.

    `surroundings`: what stands around the experts in the model, None where that is not known.
    """

    model: str
    architecture: str
    engine: EngineName
    shape: MoEShape
    surroundings: Surroundings | None = None


def _no_progress(stage: str, done: int, of: int) -> None:
    """Shows nothing."""


def resolve(
    model: str,
    *,
    engine: EngineName = "sglang",
    tp: int = 1,
    ep: int = 1,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Layer:
    """Resolve a model to the MoE layer that one rank launches.

    Args:
        model: a built-in name, a folder with a config.json, or a hub id.
        engine: the engine that serves it. SGLang fuses the shared experts of some models, vLLM does not.
        tp: tensor-parallel size of the server.
        ep: expert-parallel size of the server; 1 or `tp` in vLLM.
        dtype: `auto` for the checkpoint's, or as the command line's --dtype.
        trust_remote_code: allow transformers to run Python that comes with the checkpoint.

    Raises:
        ModelError: the model is unknown, has no experts, or cannot be split so.

    >>> layer = resolve("Qwen3-30B-A3B", tp=2)
    >>> print(layer.shape)
    E=128,N=384,K=2048,topk=8,dtype=bfloat16
    >>> resolve("GLM-4.7-Flash").shape.experts, resolve("GLM-4.7-Flash", engine="vllm").shape.experts
    (65, 64)
    """
    found = resolve_model(model, trust_remote_code=trust_remote_code)
    stated = replace(found, quantization=parse_dtype_flag(dtype, checkpoint=found.quantization))
    if dtype in ("fp16", "float16"):
        stated = replace(stated, dtype="float16")
    launched = _launched(stated, engine, Parallelism(tp, ep))
    return Layer(found.name, found.architecture, engine, launched, surroundings_of(stated, tp))


def _launched(model: MoEModel, engine: EngineName, parallelism: Parallelism) -> MoEShape:
    if engine == "vllm":
        if parallelism.ep not in (1, parallelism.tp):
            raise ModelError(f"ep={parallelism.ep}: vLLM splits experts over all {parallelism.tp} ranks, or not at all")
        return vllm_sharding.launched_shape(model, parallelism)
    here = installation.find()
    version = sharding.NEWEST if here is None else here.version
    return sharding.launched_shape(model, parallelism, engine_version=version)


def _gpu(name: str | None) -> tuple[Gpu, bool]:
    """The GPU of that name, or this machine's; and whether this machine has it."""
    here = specs.detect()
    if name is None:
        if here is None:
            raise GpuError("this machine has no GPU: name the one that is meant, such as gpu='H200'")
        return here, True
    found = find_gpu(name)
    return found, here is not None and here.device_name == found.device_name


def _request(
    layer: Layer, gpu: tuple[Gpu, bool], tokens: Sequence[int], install: Install, output_dir: Path | None, command: str
) -> TuneRequest:
    found, is_here = gpu
    return TuneRequest(
        model=layer.model,
        architecture=layer.architecture,
        problem=Problem(layer.shape, found, layer.engine),
        vllm_shape=layer.shape if layer.engine == "vllm" else None,
        gpu_is_here=is_here,
        tokens=tuple(sorted(set(tokens))),
        measuring=None,
        install=install,
        output_dir=output_dir,
        seed=0,
        command=command,
        surroundings=layer.surroundings,
    )


def weigh(
    layer: Layer,
    gpu: str | None = None,
    *,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    context: int = DECODE_CONTEXT,
    progress: Progress = _no_progress,
) -> Worth:
    """Estimate what tuning and our own kernels could win, of the layer and of a forward pass. Measures nothing.

    `verdict` puts the result into words.

    Args:
        layer: the layer, from `resolve`.
        gpu: the GPU that is meant; by default this machine's.
        tokens: numbers of tokens in a batch: from 512 on the prefill of one prompt, below a step of decode.
        context: tokens of each sequence in a step of decode.

    Raises:
        MoEExtError: the GPU is unknown, or the engine that is installed here could not be asked.

    >>> worth = weigh(resolve("GLM-4.5"), "H200", tokens=[4096])  # where no engine is installed
    >>> worth.is_asked, worth.rows[0].tuning.basis
    (False, 'unknown')
    """
    request = _request(layer, _gpu(gpu), tokens, "none", None, "sglang_moe_ext.api.weigh")
    return weighing.weigh(request, progress, context=context).worth


def verdict(worth: Worth) -> tuple[str, ...]:
    """Say in plain sentences whether tuning is worth its time, as `sglang-moe-ext plan --worth-it` ends.

    Args:
        worth: the estimate, from `weigh`.

    >>> verdict(weigh(resolve("GLM-4.5"), "H200", tokens=[4096]))  # where no engine is installed
    ('What tuning can win of prefill at 4,096 tokens is not known: SGLang is not installed here to be asked.',)
    """
    return worth_verdict.sentences(worth)


def predict(
    layer: Layer,
    gpu: str | None = None,
    *,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    install: Install = "none",
    output_dir: Path | None = None,
    progress: Progress = _no_progress,
) -> TuneOutcome:
    """Predict the best configuration at each number of tokens, by a model of the GPU and the real compiler.

    The tables are written to the user's own store; `install` and `output_dir` as the flags of `tune`. Needs Triton, and
    no GPU.

    Args:
        layer: the layer, from `resolve`.
        gpu: the GPU to predict for, such as `RTX_5090`; by default this machine's.
        tokens: numbers of tokens in a batch.

    Raises:
        MoEExtError: the GPU is unknown, Triton is missing, or a better table is present already.

    >>> outcome = predict(resolve("Qwen3-30B-A3B"), "RTX_5090", tokens=[1024])
    >>> [path.name for path in outcome.written if "_down" not in path.name]
    ['E=128,N=768,device_name=NVIDIA_GeForce_RTX_5090.json']
    """
    request = _request(layer, _gpu(gpu), tokens, install, output_dir, "sglang_moe_ext.api.predict")
    return pipeline.run(request, progress)


def measure(
    layer: Layer,
    *,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    effort: EffortName = "full",
    budget_s: float | None = None,
    install: Install = "none",
    output_dir: Path | None = None,
    progress: Progress = _no_progress,
) -> TuneOutcome:
    """Measure the best configuration at each number of tokens with the engine's own kernel, on this machine's GPU.

    Args:
        layer: the layer, from `resolve`.
        effort: `quick`, `full` or `exhaustive`, as the flag of `tune`.
        budget_s: seconds after which the search ends; by default it ends by itself.

    Raises:
        MoEExtError: this machine has no GPU, or the engine is not installed here.

    >>> measure(resolve("Qwen3-30B-A3B"))  # on a machine without a GPU
    Traceback (most recent call last):
    sglang_moe_ext.core.GpuError: this machine has no GPU: name the one that is meant, such as gpu='H200'
    """
    gpu = _gpu(None)
    request = _request(layer, gpu, tokens, install, output_dir, "sglang_moe_ext.api.measure")
    engine = request.adapter.find()
    if engine is None:
        raise EngineError(f"{request.adapter.TITLE}, whose own kernel is to be measured, is not installed here")
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    measuring = MeasureOptions(
        effort=effort,
        with_tma=request.adapter.gemms_with_tma(layer.shape.quantization, engine.version, gpu[0].sm),
        budget_s=budget_s,
        routing=routing.MIXED,
        gpus=tuple(executor.visible_gpus(None, gpu[0].device_name, names)),
        with_own_kernels=request.adapter.has_own_kernels(engine.version, gpu[0].sm),
    )
    return pipeline.run(replace(request, measuring=measuring), progress)


def lookup(
    layer: Layer,
    gpu: str | None = None,
    *,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    with_plugin: bool = True,
) -> LookupResult:
    """Ask the installed engine, in a fresh process, which configuration it takes at each number of tokens.

    Args:
        layer: the layer, from `resolve`.
        gpu: the GPU that the engine is told it runs on; by default this machine's.
        with_plugin: as in a server in which the plugin is active; False: the engine alone.

    Raises:
        MoEExtError: the engine is not installed here, or its lookup failed.

    >>> lookup(resolve("Qwen3-30B-A3B"), "H200", tokens=[64]).up  # where SGLang is not installed
    Traceback (most recent call last):
    sglang_moe_ext.core.EngineError: SGLang's own table lookup failed: SGLang is not installed in this environment
    """
    found, is_here = _gpu(gpu)
    request = LookupRequest(layer.shape, list(tokens), None if is_here else found)
    return (_AS_SERVED if with_plugin else _ALONE)[layer.engine].ask(request)


def install(engine: EngineName = "sglang", *, where: Install = "engine", output_dir: Path | None = None) -> Reinstalled:
    """Write the tables of the user's own store that were made for the running Triton where the engine reads them.

    Args:
        engine: the engine to write into.
        where: `engine` for its own folder, `overlay` for one beside it.
        output_dir: a folder to write to instead.

    Raises:
        MoEExtError: the engine is not installed here, or a place cannot be written.

    >>> install("sglang")  # where SGLang is not installed
    Traceback (most recent call last):
    sglang_moe_ext.core.EngineError: SGLang and Triton are not both installed here: run install where the server runs
    """
    return reinstall.reinstall(engine, where, output_dir)
