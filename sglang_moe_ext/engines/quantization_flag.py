"""What a server's --quantization makes of a checkpoint's experts, in either engine.

Read in `_verify_quantization` and layers/quantization of SGLang 0.5.8 to 0.5.23, and in
model_executor/layers/quantization of vLLM 0.20 to 0.33.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sglang_moe_ext.core import CheckpointFormat, ModelError, MoEModel, Quantization
from sglang_moe_ext.untrusted import show

Version = tuple[int, int, int]
TRITON_METHOD = "moe_wna16"
"""The method whose experts run the Triton kernel for groups of weights, which reads tables."""
_TRITON_KEEPS_ORDER: Version = (0, 33, 0)
"""From this vLLM on, moe_wna16 takes weights in an order of their own."""
_GPTQ_RUNS_MARLIN: Version = (0, 25, 0)
"""Before this vLLM, `--quantization gptq` runs MoeWNA16Method, whatever Marlin would take."""
_UNSET = "unquant"
"""SGLang's word for what the checkpoint says."""
_WITHOUT_EXPERTS = ("awq", "gptq")
"""Values of SGLang whose methods have no kernel for experts."""


@dataclass(frozen=True, slots=True)
class FlagReader:
    """One engine's values. `online`: of weights in 16 bits; `same`: by method of the checkpoint, what keeps it.

    `others`: values whose experts run no Triton kernel that reads a table.
    """

    title: str
    online: Mapping[str, Quantization]
    same: Mapping[str, frozenset[str]]
    others: frozenset[str]

    @property
    def known(self) -> list[str]:
        """Every value that says something of the experts' kernel, as users write it."""
        names = {TRITON_METHOD, *self.online, *(name for names in self.same.values() for name in names)}
        return sorted(name.replace("compressed_tensors", "compressed-tensors") for name in names)


def _online(method: str, quantization: Quantization) -> Quantization:
    return replace(quantization, checkpoint=CheckpointFormat(method, quantization.weight_bits))


_FP8 = _online("fp8", Quantization("fp8_w8a8"))
_FP8_BY_CHANNEL = _online("w8a8_fp8", Quantization("fp8_w8a8", per_channel=True))
_INT8_WEIGHTS = _online("experts_int8", Quantization("int8_w8a16", per_channel=True))
_MODELOPT = frozenset({"modelopt", "modelopt_fp8", "modelopt_mixed"})

_READERS: Mapping[str, FlagReader] = {
    "sglang": FlagReader(
        title="SGLang",
        online={
            "fp8": _FP8,
            "w8a8_fp8": _FP8_BY_CHANNEL,
            "w8a8_int8": _online("w8a8_int8", Quantization("int8_w8a8", per_channel=True)),
        },
        same={
            "awq": frozenset({"awq_marlin", "marlin"}),
            "gptq": frozenset({"gptq_marlin", "marlin"}),
            "fp8": frozenset({"fp8"}),
            "compressed_tensors": frozenset({"compressed_tensors", "w8a8_fp8", "w8a8_int8"}),
            "auto_round": frozenset({"auto_round"}),
            "blockwise_int8": frozenset({"blockwise_int8"}),
            "w8a8_fp8": frozenset({"w8a8_fp8"}),
            "w8a8_int8": frozenset({"w8a8_int8"}),
            "fbgemm_fp8": frozenset({"fbgemm_fp8"}),
            "modelopt": _MODELOPT,
        },
        others=frozenset(
            {
                *("mxfp4", "mxfp8", "mxfp_w4a8", "modelopt_fp4", "nvfp4_online", "petit_nvfp4", "minimax_m3_nvfp4"),
                *("bitsandbytes", "gguf", "qoq", "w4afp8", "humming", "modelslim", "mlx_q4", "mlx_q8"),
                *("quark", "quark_int4fp8_moe", "quark_mxfp4"),
            }
        ),
    ),
    "vllm": FlagReader(
        title="vLLM",
        online={
            "fp8": _FP8,
            "fp8_per_tensor": _FP8,
            "fp8_per_block": _online("fp8", Quantization("fp8_w8a8", (128, 128))),
            "fp8_per_channel": _FP8_BY_CHANNEL,
            "experts_int8": _INT8_WEIGHTS,
            "int8_per_channel_weight_only": _INT8_WEIGHTS,
        },
        same={
            "awq": frozenset({"awq", "awq_marlin", "auto_awq"}),
            "gptq": frozenset({"gptq", "gptq_marlin", "auto_gptq"}),
            "fp8": frozenset({"fp8"}),
            "compressed_tensors": frozenset({"compressed_tensors"}),
            "auto_round": frozenset({"inc", "auto_round"}),
            "fbgemm_fp8": frozenset({"fbgemm_fp8"}),
            "modelopt": _MODELOPT,
        },
        others=frozenset(
            {
                *("mxfp4", "mxfp8", "gpt_oss_mxfp4", "modelopt_fp4", "modelopt_mxfp8", "nvfp4_per_token"),
                *("bitsandbytes", "gguf", "deepseek_v4_fp8", "humming", "fp_quant", "quark", "torchao", "online"),
                *("tpu_int8", "cpu_awq"),
            }
        ),
    ),
}


def quantize_as_served(model: MoEModel, flag: str | None, engine: str, version: Version) -> MoEModel:
    """The model as a server of that engine runs it under `--quantization FLAG`; None: the checkpoint decides.

    Raises:
        ModelError: the engine refuses that value for the checkpoint, or its experts run another kernel.
    """
    reader, wanted = _READERS[engine], (flag or "").strip().lower().replace("-", "_")
    if flag is None or (wanted == _UNSET and engine == "sglang"):
        return model
    if wanted in reader.others:
        raise ModelError(
            f"--quantization {show(flag)}: such experts do not run the Triton kernel that tables configure, so that no "
            "table is read; where yours do, state their weights with --dtype instead"
        )
    if wanted not in {name.replace("-", "_") for name in (*reader.known, *_WITHOUT_EXPERTS)}:
        named = show(flag) or "with no name"
        raise ModelError(
            f"--quantization {named} is not known for {reader.title}: expected one of {', '.join(reader.known)}; or "
            "leave it out and state the weights with --dtype"
        )
    quantization = _served(model.quantization, wanted, reader, version)
    if isinstance(quantization, str):
        raise ModelError(f"--quantization {show(flag)}: {model.name} {quantization}")
    older = model.older_readings if quantization == model.quantization else ()
    return replace(model, quantization=quantization, older_readings=older)


def _served(found: Quantization, wanted: str, reader: FlagReader, version: Version) -> Quantization | str:
    """The quantization that runs, or why the engine refuses."""
    stored = found.checkpoint
    if found.scheme is None:
        return reader.online.get(wanted, f"is not quantized, and {reader.title} expects a checkpoint that is")
    if stored is None:
        return "has weights that --dtype states; leave one of the two out"
    is_vllm = reader.title == "vLLM"
    if wanted == TRITON_METHOD or (is_vllm and wanted == stored.method == "gptq" and version < _GPTQ_RUNS_MARLIN):
        return _by_triton(found, stored, keeps_order=is_vllm and version >= _TRITON_KEEPS_ORDER)
    return found if wanted in reader.same.get(stored.method, ()) else _explain_refusal(stored, wanted, reader)


def _explain_refusal(stored: CheckpointFormat, wanted: str, reader: FlagReader) -> str:
    if wanted == stored.method and wanted in _WITHOUT_EXPERTS:
        return (
            f"stores {wanted.upper()} weights, whose experts {reader.title} runs under {wanted}_marlin or "
            f"{TRITON_METHOD} alone; leave the flag out, or name one of these"
        )
    return f"is quantized with {show(stored.method)}, so that {reader.title} refuses the flag; leave it out"


def _by_triton(found: Quantization, stored: CheckpointFormat, *, keeps_order: bool) -> Quantization | str:
    has_order = stored.method == "gptq" and stored.activation_order and not keeps_order
    bits = {"awq": (4,), "gptq": (4, 8), TRITON_METHOD: (4, 8)}.get(stored.method, ())
    if stored.bits in bits and not has_order:
        return replace(found, checkpoint=replace(stored, method=TRITON_METHOD))
    ordered = " in an order of their own" if has_order else ""
    return (
        f"has weights of {stored.bits} bits of {show(stored.method)}{ordered}, and the flag takes AWQ of 4 bits, and "
        "GPTQ of 4 or 8 bits without desc_act, alone; leave it out"
    )
