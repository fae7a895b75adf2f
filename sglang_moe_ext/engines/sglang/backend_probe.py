"""Ask the real SGLang which kernel runs a layer's experts: its server's own choice, then its quantization method's.

Called in the process of a probe, after its lookup: what is changed of the engine here never reaches a server.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from sglang_moe_ext.core import EngineError

Request = Mapping[str, Any]
_PREFIX = "model.layers.0.mlp.experts"
_OVERRIDES = "sglang.srt.arg_groups.overrides"
"""Since 0.5.14 it says what each architecture makes of `auto`; before, a method of the server's arguments did."""
_MODULES = (
    "sglang.srt.layers.quantization",
    "sglang.srt.layers.quantization.unquant",
    "sglang.srt.layers.moe.fused_moe_triton",
    "sglang.srt.layers.moe.utils",
)
_PASSES = ("_deepseek_moe_quant_resolution", "_moe_runner_backend_quant_constraints")
_PROBES = ("is_", "get_device", "has_", "_check")
_CUDA = "12.9"
"""Of a GPU that is pretended: newer than any that a release asks for."""


def ask(request: Request) -> dict[str, str]:
    """`name`: of the backend, as --moe-runner-backend spells it; `method`: the engine's class that chose it.

    Args:
        request: the part of that name that `lookup_probe.request_of` makes.

    Raises:
        EngineError: the engine raises, or this release chooses in a way that is not known.
    """
    try:
        for module in _MODULES:
            importlib.import_module(module)  # before the engine believes in a GPU, which it would ask for much
        args = _server_args(request)
        if request["sm"] is not None:
            _believe_in(request["sm"], request["device"])
        return _ask_method(request, _resolve_flag(request, args))
    except EngineError:
        raise
    except Exception as error:  # whatever it is, no answer came of it
        raise EngineError(f"{type(error).__name__}: {error}") from error


def _engine_modules() -> list[Any]:
    return [module for name, module in list(sys.modules.items()) if name.startswith("sglang.") and module is not None]


def _believe_in(sm: int, device_name: str) -> None:
    import torch

    torch.cuda.get_device_name = lambda *_: device_name

    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: divmod(sm, 10)
    torch.cuda.current_device = lambda: 0
    torch.version.cuda = _CUDA
    for module in _engine_modules():
        for name, value in list(vars(module).items()):
            if name.startswith(_PROBES) and callable(forget := getattr(value, "cache_clear", None)):
                forget()
        if hasattr(module, "_is_cuda"):
            module._is_cuda = True


def _replace(name: str, value: object) -> None:
    """In every module of the engine that has bound it."""
    for module in _engine_modules():
        if name in vars(module):
            setattr(module, name, value)


def _server_args(request: Request) -> Any:
    from sglang.srt.server_args import ServerArgs  # type: ignore[import-not-found]

    args = ServerArgs(model_path="dummy", device="cpu")
    args.moe_runner_backend, args.quantization = request["flag"], request["quantization"]
    args.tp_size = args.ep_size = request["ep"]
    if not hasattr(args, "_quantization_explicitly_unset"):
        args._quantization_explicitly_unset = False
    return args


def _resolve_flag(request: Request, args: Any) -> str:
    """What the server makes of --moe-runner-backend for a model of that architecture."""
    stated = {} if request["section"] is None else {"quantization_config": request["section"]}
    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=[request["architecture"]], model_type="", **stated))
    overrides = _overrides()
    if overrides is None and ".get_model_config()" not in inspect.getsource(args._handle_model_specific_adjustments):
        raise EngineError("this release asks the hub for the model's configuration")
    args._model_config = model
    args.get_model_config, args.get_hf_config = lambda: model, lambda: model.hf_config
    if overrides is None:
        args._handle_model_specific_adjustments()
        return str(args.moe_runner_backend)
    declared = overrides.collect_model_override_declarations(request["architecture"], args, model.hf_config)
    args._resolved_overrides = list(declared)
    for name in _PASSES:
        overrides.run_post_process_pass(args, getattr(overrides, name))
    return str(overrides.resolved_view(args).moe_runner_backend)


def _overrides() -> Any:
    try:
        return importlib.import_module(_OVERRIDES)
    except ModuleNotFoundError:
        return None


class _Runner:
    """Stands for the engine's MoeRunner: it says which backend it was made for."""

    def __init__(self, backend: Any, *_: Any, **__: Any) -> None:
        self.backend = backend
        _made.append(backend)


_made: list[Any] = []


def _ask_method(request: Request, flag: str) -> dict[str, str]:
    from sglang.srt.layers.moe.utils import MoeRunnerBackend  # type: ignore[import-not-found]

    backend = MoeRunnerBackend(flag)
    _replace("get_moe_runner_backend", lambda: backend)
    _replace("MoeRunner", _Runner)
    layer, runner_config = _layer(request)
    config = _quantization_config(request)
    method = None if config is None else config.get_quant_method(layer, _PREFIX)
    if method is None:
        if config is not None:
            raise EngineError(f"{type(config).__name__} has no method for experts")
        method = _unquantized(backend)
    scheme = getattr(layer, "scheme", None)
    name = type(method if scheme is None else scheme).__name__
    if "Marlin" in name or (config is not None and "Marlin" in type(config).__name__ and "WNA16" not in name):
        return {"name": "marlin", "method": name}  # most releases launch it without a runner
    del _made[:]
    method.create_moe_runner(layer, runner_config)
    if not _made:
        raise EngineError(f"{name} makes no runner")
    return {"name": str(_made[0].value), "method": name}


def _layer(request: Request) -> tuple[Any, Any]:
    """(The engine's layer, of which only what a method asks for is there; its part that a runner is given.)"""
    import torch
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE  # type: ignore[import-not-found]

    sizes = {
        "num_experts": request["experts"],
        "num_local_experts": request["experts"],
        "hidden_size": request["hidden_size"],
        "intermediate_size_per_partition": request["intermediate_size"],
        "top_k": request["top_k"],
    }
    stated = {
        "activation": "silu",
        "is_gated": request["gated"],
        "apply_router_weight_on_input": False,
        "inplace": True,
    }
    absent = ("routed_scaling_factor", "gemm1_alpha", "gemm1_clamp_limit", "swiglu_limit", "layer_id")
    config = SimpleNamespace(**sizes, **stated, **dict.fromkeys(absent), num_fused_shared_experts=0, no_combine=False)
    layer = FusedMoE.__new__(FusedMoE)
    torch.nn.Module.__init__(layer)
    for name, value in {**sizes, "moe_runner_config": config, "moe_tp_size": 1, "moe_ep_size": request["ep"]}.items():
        object.__setattr__(layer, name, value)
    return layer, config


def _quantization_config(request: Request) -> Any:
    """The engine's configuration of the method that runs such a checkpoint, as `_verify_quantization` finds it."""
    from sglang.srt.layers import quantization  # type: ignore[import-not-found]

    section, name = request["section"], request["quantization"]
    if section is None:
        return None if name is None else quantization.get_quantization_config(name)()
    chosen = section["quant_method"]
    for known in quantization.QUANTIZATION_METHODS.values():
        if taken := known.override_quantization_method(section, name):
            chosen = taken
            break
    config = quantization.get_quantization_config(chosen).from_config(section)
    config.packed_modules_mapping = {}
    return config


_FLAGS: tuple[tuple[str, str], ...] = (
    ("use_triton_kernels", "is_triton_kernels"),
    ("use_flashinfer_trtllm_moe", "is_flashinfer_trtllm"),
    ("use_deep_gemm", "is_deep_gemm"),
)
"""What FusedMoE gives the method of weights in 16 bits, and the question to the backend that it is."""


def _unquantized(backend: Any) -> Any:
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod  # type: ignore[import-not-found]

    known = inspect.signature(UnquantizedFusedMoEMethod.__init__).parameters
    answers: dict[str, bool] = {name: getattr(backend, of)() for name, of in _FLAGS if name in known}
    if backend.value not in ("auto", "triton") and not any(answers.values()):
        raise EngineError(f"weights in 16 bits under {backend.value}, which this release decides elsewhere")
    return UnquantizedFusedMoEMethod(**answers)
