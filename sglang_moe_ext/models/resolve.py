"""From what a user calls a model to its experts: a folder, a built-in name, or a hub id."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from logging import ERROR
from pathlib import Path

from sglang_moe_ext.core import ModelError, MoEModel
from sglang_moe_ext.models import mistral_native
from sglang_moe_ext.models.checkpoint_names import FormatWithoutTables, NameMatch, close_names, match_name
from sglang_moe_ext.models.config_fields import CONFIG_CLASS_ERRORS, Section, describe_error, refusal, show
from sglang_moe_ext.models.decoder import read_decoder
from sglang_moe_ext.models.depth import count_moe_layers
from sglang_moe_ext.models.hf_config import from_config, leaves_to_its_class
from sglang_moe_ext.models.quantization import read_quantization


def config_of_class(path: str, *, trust_remote_code: bool) -> Section:
    """The config with the defaults of its class. `path`: a folder, a file or a hub id.

    Raises: ModelError when transformers is not installed, or does not know the class.
    """
    try:
        from huggingface_hub import errors
        from transformers import AutoConfig
        from transformers.utils import logging
    except ImportError as error:
        raise refusal(
            "transformers", "not installed; `pip install transformers` fills in what a config omits"
        ) from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        config: Section = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (
        getattr(errors, "StrictDataclassError", ValueError),
        ImportError,
        AssertionError,
        *CONFIG_CLASS_ERRORS,
    ) as error:
        raise _refuse_not_loaded(error, trust_remote_code=trust_remote_code) from error
    finally:
        logging.set_verbosity(verbosity)
    return config


def _refuse_not_loaded(error: Exception, *, trust_remote_code: bool) -> ModelError:
    if "trust_remote_code" in str(error) and not trust_remote_code:
        return refusal("transformers", "its config class is Python of its own; add --trust-remote-code if you trust it")
    return refusal("transformers", f"cannot load it ({describe_error(error)}); upgrade it, or complete the config")


CONFIG = "config.json"
MODELOPT_CONFIG = "hf_quant_config.json"
LARGEST_BYTES = 64 << 20
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(model: str, *, trust_remote_code: bool = False, section: str | None = None) -> MoEModel:
    """Look for a folder with a config.json first, then among the built-in names, then on the hub.

    `trust_remote_code` lets transformers run Python code of the checkpoint. With `section`, only that part of a local
    config.json is read.

    Raises: ModelError
    """
    path = os.path.expanduser(model)
    if section is not None:
        return _resolve_section(model, section)
    if os.path.isfile(os.path.join(path, CONFIG)):
        return _resolve_folder(Path(path), trust_remote_code=trust_remote_code)
    if os.path.isfile(os.path.join(path, mistral_native.FILE_NAME)):
        return _resolve_file(Path(path, mistral_native.FILE_NAME), trust_remote_code=trust_remote_code)
    if os.path.isfile(path):
        return _resolve_file(Path(path), trust_remote_code=trust_remote_code)
    match match_name(model):
        case NameMatch(model=found):
            return found
        case FormatWithoutTables(model=known, format=name):
            raise refusal(
                model,
                f"{known.name} in {name}, whose experts do not run the fused Triton kernel: no table is read; name the "
                "checkpoint that a server loads",
            )
        case None:
            pass
    if os.path.isdir(path):
        raise refusal(
            model,
            f"the folder has no {CONFIG}, nor {mistral_native.FILE_NAME}; give the folder of a checkpoint, or --shape",
        )
    if HUB_ID.fullmatch(model) is None:
        raise _unknown(model)
    return _resolve_hub(model, trust_remote_code=trust_remote_code)


def _unknown(model: str) -> ModelError:
    return refusal(
        "model",
        f"{show(model)} is no folder, built-in name or hub id; {_did_you_mean(model)}else give a folder with a "
        f"{CONFIG}, or --shape",
    )


def _did_you_mean(model: str) -> str:
    close = close_names(model)
    return f"did you mean {' or '.join(close)}? " if close else ""


def _resolve_section(model: str, section: str) -> MoEModel:
    """A section of a local config.json, with the quantization of the whole."""
    path = Path(model).expanduser()
    path = path / CONFIG if path.is_dir() else path
    if not path.is_file():
        raise refusal(model, f"--model-prefix names a section of a local {CONFIG}; download it, or leave the flag out")
    whole = _with_modelopt(_parsed(path), path.parent)
    found = whole.get(section)
    if not isinstance(found, dict):
        sections = ", ".join(name for name, value in whole.items() if isinstance(value, dict)) or "none"
        raise refusal(str(path), f"no section {show(section)}; it has {sections}")
    quantized = {name: whole[name] for name in ("quantization_config",) if name in whole and name not in found}
    return from_config({**found, **quantized}, name=path.resolve().parent.name, source=f"{path}, {section}")


def _resolve_folder(folder: Path, *, trust_remote_code: bool) -> MoEModel:
    raw = _with_modelopt(_parsed(folder / CONFIG), folder)
    return _resolve_raw(
        raw,
        name=folder.resolve().name,
        source=str(folder / CONFIG),
        of_class=lambda: config_of_class(str(folder), trust_remote_code=trust_remote_code),
    )


def _resolve_file(path: Path, *, trust_remote_code: bool) -> MoEModel:
    parsed = _parsed(path)
    is_native = path.name == mistral_native.FILE_NAME
    raw = mistral_native.to_hf_config(parsed, str(path)) if is_native else _with_modelopt(parsed, path.parent)
    return _resolve_raw(
        raw,
        name=path.resolve().parent.name if is_native or path.name == CONFIG else path.stem,
        source=str(path),
        of_class=lambda: config_of_class(str(path), trust_remote_code=trust_remote_code),
    )


def _resolve_hub(hub_id: str, *, trust_remote_code: bool) -> MoEModel:
    from sglang_moe_ext.models import hub  # brings urllib, which a local model does not need

    folder = hub.download(hub_id, CONFIG, hint=_did_you_mean(hub_id)).parent
    raw = _parsed(folder / CONFIG)
    if not raw.get("quantization_config"):
        hub.download(hub_id, MODELOPT_CONFIG, must_exist=False)
    return _resolve_raw(
        _with_modelopt(raw, folder),
        name=hub_id,
        source=f"{hub_id} on the hub",
        of_class=lambda: config_of_class(hub_id, trust_remote_code=trust_remote_code),
    )


def _resolve_raw(raw: dict[str, object], *, name: str, source: str, of_class: Callable[[], Section]) -> MoEModel:
    """Read the file alone where it states everything; else ask transformers for the defaults of its class."""
    if not leaves_to_its_class(raw):
        return _with_depth(from_config(raw, name=name, source=source), raw)
    try:
        config = of_class()
    except ModelError as of_transformers:
        return _without_its_class(raw, of_transformers, name=name, source=source)
    model = from_config(config, name=name, source=source)
    return _with_depth(read_quantization(model, raw, source=source), config)


def _with_depth(model: MoEModel, config: Section) -> MoEModel:
    """The model with what its config tells of the layers around the experts."""
    counted = replace(model, moe_layers=count_moe_layers(config))
    return replace(counted, decoder=read_decoder(config, counted))


def _without_its_class(raw: dict[str, object], of_transformers: ModelError, *, name: str, source: str) -> MoEModel:
    try:
        return _with_depth(from_config(raw, name=name, source=source), raw)
    except ModelError as of_file:
        raise ModelError(f"{of_file}; {of_transformers}") from of_transformers


def _with_modelopt(raw: dict[str, object], folder: Path) -> dict[str, object]:
    """Older checkpoints of ModelOpt state their quantization in a file of its own."""
    path = folder / MODELOPT_CONFIG
    if raw.get("quantization_config") or not path.is_file():
        return raw
    return {**raw, "quantization_config": {"quant_method": "modelopt", **_parsed(path)}}


def _parsed(path: Path) -> dict[str, object]:
    source = str(path)
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise refusal(source, f"larger than {LARGEST_BYTES >> 20} MiB, expected a config; give the right file")
        parsed = json.loads(path.read_bytes())
    except OSError as error:
        raise refusal(source, f"cannot be read ({error.strerror}); check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise refusal(
            source, f"not JSON ({show(str(error))}); download it again, or state the experts with --shape"
        ) from error
    if not isinstance(parsed, dict):
        raise refusal(source, f"{show(parsed)} where an object was expected; give a model's {CONFIG}")
    return parsed
