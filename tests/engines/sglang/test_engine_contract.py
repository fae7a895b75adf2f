"""What we believe of SGLang against each real one: its file names, its signatures, what it takes without our tables.

One subprocess a version answers all of it.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.core import MoEShape, Quantization
from sglang_moe_ext.engines import lookup_probe, table_names
from sglang_moe_ext.engines.lookup_probe import LookupRequest
from sglang_moe_ext.engines.sglang import table_names as sglang_table_names
from sglang_moe_ext.gpu.names import find_gpu
from tests.engines.installed import ENGINE_VERSIONS, run_in_engine

CHILD = Path(__file__).parents[1] / "children" / "engine_contract.py"
FUNCTIONS = ("invoke_fused_moe_kernel", "moe_align_block_size", "try_get_optimal_moe_config", "fused_experts_impl")
DEVICES = ("NVIDIA H200", "NVIDIA RTX PRO 6000 Blackwell Server Edition")
QUANTIZATIONS = (
    Quantization(),
    Quantization("fp8_w8a8"),
    Quantization("fp8_w8a8", per_channel=True),
    Quantization("fp8_w8a8", (128, 128)),
    Quantization("fp8_w8a8", (64, 128)),
    Quantization("int8_w8a8", per_channel=True),
    Quantization("int8_w8a8", (128, 128)),
    Quantization("int8_w8a16", per_channel=True),
    Quantization("int8_w8a16", (0, 128)),
    Quantization("int4_w4a16", (0, 32)),
)


@dataclass(frozen=True, slots=True)
class NameCase:
    device: str
    quantization: Quantization
    down: bool

    @property
    def shape(self) -> MoEShape:
        return MoEShape(65, 1536, 2048, 5, self.quantization)

    def request(self) -> dict[str, Any]:
        """What the engine is asked: it reads N from the weights, where two int4 values lie in one byte."""
        block = self.quantization.block_shape
        return {
            "device": self.device,
            "experts": 65,
            "n": 768 if self.quantization.scheme == "int4_w4a16" else 1536,
            "scheme": self.quantization.scheme,
            "block": None if block is None else list(block),
            "per_channel": self.quantization.per_channel,
            "down": self.down,
        }


NAME_CASES = [NameCase(*case) for case in itertools.product(DEVICES, QUANTIZATIONS, (False, True))]
H200 = find_gpu("H200")
SHIPPED = LookupRequest(MoEShape(128, 768, 2048, 8), (1, 64, 5000), H200)
"""Qwen3-30B-A3B on an H200: every release ships its table, for an older Triton than the one here."""
UNKNOWN = LookupRequest(MoEShape(97, 96, 256, 3), (1, 97, 98), H200)
DETERMINISTIC = LookupRequest(SHIPPED.shape, SHIPPED.tokens, H200, deterministic=True)
LOOKUPS = {"shipped": SHIPPED, "unknown": UNKNOWN, "deterministic": DETERMINISTIC}


@functools.cache
def engine(version: str) -> dict[str, Any]:
    requests = {name: lookup_probe.request_of(question) for name, question in LOOKUPS.items()}
    answer: dict[str, Any] = run_in_engine(
        version, CHILD, {"names": [case.request() for case in NAME_CASES], "lookups": requests}
    )
    return answer


def taken(version: str, question: str) -> dict[int, Any]:
    return {int(m): pair for m, pair in engine(version)["lookups"][question]["taken"].items()}


every_version = pytest.mark.parametrize("version", ENGINE_VERSIONS)


@every_version
def test_our_file_names_are_the_engines(version: str) -> None:
    ours = [
        sglang_table_names.file_name(sglang_table_names.table_key(case.shape, case.device, down=case.down))
        for case in NAME_CASES
    ]
    assert ours == engine(version)["names"]


@every_version
def test_we_read_the_engines_file_names_as_the_keys_they_stand_for(version: str) -> None:
    keys = [sglang_table_names.table_key(case.shape, case.device, down=case.down) for case in NAME_CASES]
    assert [table_names.parse(name) for name in engine(version)["names"]] == keys


@every_version
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_engines_function_takes_the_arguments_that_we_pass(version: str, function: str) -> None:
    assert engine(version)["misfits"][function] is None


@every_version
def test_a_shipped_table_of_an_older_triton_is_reported_with_its_file(version: str) -> None:
    (file,) = engine(version)["lookups"]["shipped"]["files"]
    assert Path(file).name == "E=128,N=768,device_name=NVIDIA_H200.json"


@every_version
def test_a_shipped_table_of_an_older_triton_is_reported_with_the_engines_warning(version: str) -> None:
    assert any("Fallback to triton version" in line for line in engine(version)["lookups"]["shipped"]["log"])


@every_version
def test_a_layer_without_any_table_opens_no_file(version: str) -> None:
    assert engine(version)["lookups"]["unknown"]["files"] == []


@every_version
def test_a_layer_without_any_table_runs_the_engines_default(version: str) -> None:
    """The default knows two batch sizes: up to as many tokens as experts, and more."""
    rows = {m: pair["up"]["BLOCK_SIZE_M"] for m, pair in taken(version, "unknown").items()}
    assert rows == {1: 16, 97: 16, 98: 64}


@every_version
def test_deterministic_inference_opens_no_file(version: str) -> None:
    assert engine(version)["lookups"]["deterministic"]["files"] == []


@every_version
def test_deterministic_inference_runs_one_configuration_at_every_m(version: str) -> None:
    assert len({tuple(pair["up"].items()) for pair in taken(version, "deterministic").values()}) == 1


@every_version
def test_the_engine_says_that_it_is_the_version_that_we_asked(version: str) -> None:
    assert engine(version)["lookups"]["shipped"]["engine_version"].startswith(version)
