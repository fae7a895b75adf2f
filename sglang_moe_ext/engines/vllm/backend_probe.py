"""Ask the real vLLM which kernel runs a layer's experts: the method that it builds for them says so.

Called in the process of a probe, after its lookup: what is changed of the engine here never reaches a server.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from sglang_moe_ext.core import EngineError

Request = Mapping[str, Any]
_PREFIX = "model.layers.0.mlp.experts"
_LAYERS = ("RoutedExperts", "FusedMoE")
"""The class of a layer's experts, which a method looks for: the first since 0.25."""


def ask(request: Request) -> dict[str, str]:
    """`name`: of the backend, as vLLM spells it; `method`: the engine's class that chose it.

    Args:
        request: the part of that name that `lookup_probe.request_of` makes.

    Raises:
        EngineError: the engine raises, or this release chooses in a way that is not known.
    """
    if request["sm"] is not None and not request["weight_only"]:
        raise EngineError("vLLM chooses among compiled operators, which can be asked on the GPU itself alone")
    try:
        with _without_pretence():
            settings = _prepare()
        if request["sm"] is not None:
            _believe_in(request["sm"])
        return _ask(request, settings)
    except EngineError:
        raise
    except Exception as error:  # whatever it is, no answer came of it
        raise EngineError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _without_pretence() -> Iterator[None]:
    """While the platform is what it is, whatever the lookup was made to believe."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    pretended = vars(platform).get("is_cuda")
    if pretended is not None:
        del platform.is_cuda
    yield
    if pretended is not None:
        platform.is_cuda = pretended


def _prepare() -> Any:
    """Import all methods, some of which ask a GPU for operators while they are imported; gives a server's settings."""
    from vllm.config import DeviceConfig, VllmConfig
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.platforms import current_platform

    get_quantization_config("fp8")
    return VllmConfig(device_config=DeviceConfig(device=current_platform.device_type or "cpu"))


def _believe_in(sm: int) -> None:
    from vllm.platforms import current_platform, interface

    platform = type(current_platform)
    capability = interface.DeviceCapability(*divmod(sm, 10))
    platform.is_cuda = platform.is_cuda_alike = lambda _: True
    platform.is_cpu = lambda _: False
    platform.get_device_capability = classmethod(lambda *_, **__: capability)


def _ask(request: Request, settings: Any) -> dict[str, str]:
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(settings):
        layer = _layer(request)
        config = _quantization_config(request)
        if config is None:
            from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

            method = UnquantizedFusedMoEMethod(layer.moe_config)
        else:
            method = config.get_quant_method(layer, _PREFIX)
    name = type(method).__name__
    backends = [it for it in vars(method).values() if isinstance(it, enum.Enum) and "Backend" in type(it).__name__]
    if backends:
        return {"name": str(backends[0].value).lower(), "method": name}
    if "WNA16" in name and "Marlin" not in name:
        return {"name": "triton", "method": name}
    if "Marlin" in name:
        return {"name": "marlin", "method": name}
    raise EngineError(f"{name} does not say which backend it takes")


def _layer(request: Request) -> Any:
    import torch
    from vllm.model_executor.layers import fused_moe
    from vllm.model_executor.layers.fused_moe import config

    ranks = request["ep"]
    parallel: dict[str, Any] = dict.fromkeys((it.name for it in dataclasses.fields(config.FusedMoEParallelConfig)), 0)
    parallel |= dict.fromkeys(("tp_size", "pcp_size", "dp_size", "sp_size"), 1)
    parallel |= {"ep_size": ranks, "use_ep": ranks > 1, "enable_eplb": False, "all2all_backend": "naive"}
    of_parallel = config.FusedMoEParallelConfig(**parallel)
    columns, experts = request["intermediate_size"], request["experts"] * ranks
    stated = {
        "num_experts": experts,
        "experts_per_token": request["top_k"],
        "hidden_dim": request["hidden_size"],
        "intermediate_size": columns,
        "intermediate_size_per_partition": columns,
        "num_local_experts": request["experts"],
        "num_logical_experts": experts,
        "activation": config.MoEActivation.SILU if request["gated"] else config.MoEActivation.SILU_NO_MUL,
        "is_act_and_mul": request["gated"],
        "device": "cpu",
        "routing_method": config.RoutingMethodType.Renormalize,
        "moe_parallel_config": of_parallel,
        "in_dtype": getattr(torch, request["dtype"]),
        "moe_backend": request["flag"],
    }
    known = inspect.signature(config.FusedMoEConfig).parameters
    kind = next(found for name in _LAYERS if (found := getattr(fused_moe, name, None)) is not None)
    made = kind.__new__(kind)
    torch.nn.Module.__init__(made)
    attributes = {
        "moe_config": config.FusedMoEConfig(**{name: value for name, value in stated.items() if name in known}),
        "hidden_size": request["hidden_size"],
        "intermediate_size_per_partition": columns,
        "apply_router_weight_on_input": False,
        "moe_parallel_config": of_parallel,
        "layer_name": _PREFIX,
        "ckpt_gate_proj_name": "gate_proj",
        "ckpt_up_proj_name": "up_proj",
        "ckpt_down_proj_name": "down_proj",
    }
    for name, value in attributes.items():
        if not isinstance(getattr(kind, name, None), property):  # which reads moe_config
            object.__setattr__(made, name, value)
    return made


def _quantization_config(request: Request) -> Any:
    """The engine's configuration of the method that runs such a checkpoint, as its model configuration finds it."""
    from vllm.model_executor.layers import quantization

    section, name = request["section"], request["quantization"]
    if section is None:
        return None
    chosen = section["quant_method"]
    for known in quantization.QUANTIZATION_METHODS:
        kind = quantization.get_quantization_config(known)
        takes = inspect.signature(kind.override_quantization_method).parameters
        more = {"hf_config": SimpleNamespace(model_type="", architectures=[])} if "hf_config" in takes else {}
        if taken := kind.override_quantization_method(dict(section), name, **more):
            chosen = taken
            break
    made = quantization.get_quantization_config(chosen).from_config(dict(section))
    made.packed_modules_mapping = {}
    return made
