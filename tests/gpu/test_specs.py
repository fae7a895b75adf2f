"""Facts of GPUs, and the many names that people give them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_moe_ext.core import GpuError
from sglang_moe_ext.gpu import amd_specs, names, specs
from sglang_moe_ext.gpu.names import find_gpu


@pytest.mark.parametrize("name", specs.known_gpus())
def test_a_gpu_is_found_by_the_name_that_torch_reports(name: str) -> None:
    assert find_gpu(name).device_name == name


@pytest.mark.parametrize("name", specs.known_gpus())
def test_a_gpu_is_found_by_the_name_that_file_names_have(name: str) -> None:
    assert find_gpu(name.replace(" ", "_")).device_name == name


@pytest.mark.parametrize(
    ("said", "device_name"),
    [
        ("H200", "NVIDIA H200"),
        ("h200", "NVIDIA H200"),
        ("RTX_4090", "NVIDIA GeForce RTX 4090"),
        ("rtx-4090", "NVIDIA GeForce RTX 4090"),
        ("GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("A100", "NVIDIA A100-SXM4-80GB"),
        ("H100", "NVIDIA H100 80GB HBM3"),
        (" L40S ", "NVIDIA L40S"),
        ("RTX PRO 6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"),
        ("dgx spark", "NVIDIA GB10"),
        ("MI300X", "AMD Instinct MI300X"),
        ("mi355x", "AMD Instinct MI355X"),
    ],
)
def test_a_gpu_is_found_by_what_people_call_it(said: str, device_name: str) -> None:
    assert find_gpu(said).device_name == device_name


def test_an_unknown_gpu_is_refused_with_the_closest_names() -> None:
    with pytest.raises(GpuError, match=r"unknown GPU 'RTX 4091'.*NVIDIA_GeForce_RTX_4090"):
        find_gpu("RTX 4091")


@pytest.mark.parametrize("said", ["", "NVIDIA", "GeForce", "zzzzzz"], ids=["nothing", "vendor", "brand", "nonsense"])
def test_a_name_like_none_is_refused_with_examples(said: str) -> None:
    with pytest.raises(GpuError, match="such as"):
        find_gpu(said)


def test_no_two_gpus_share_a_plain_name() -> None:
    assert len({names._plain(name) for name in specs.known_gpus()}) == len(specs.known_gpus())


@pytest.mark.parametrize("alias", names._ALIASES)
def test_an_alias_hides_no_gpu(alias: str) -> None:
    assert names._plain(alias) not in {names._plain(name) for name in specs.known_gpus()}


@pytest.mark.parametrize("name", specs.known_gpus())
def test_the_facts_of_a_gpu_are_those_of_its_architecture(name: str) -> None:
    gpu = find_gpu(name)
    if gpu.target.is_amd:
        expected = (amd_specs.CDNA[gpu.target.gfx].lds_bytes,) * 2
    else:
        architecture = specs.ARCHITECTURES[gpu.sm]
        expected = architecture.smem_per_block, architecture.smem_per_multiprocessor
    assert (gpu.smem_per_block, gpu.smem_per_multiprocessor) == expected


@pytest.mark.parametrize("name", specs.known_gpus())
def test_a_gpu_has_an_fp8_rate_from_sm_89_and_gfx942_on(name: str) -> None:
    gpu = find_gpu(name)
    assert (gpu.fp8_tflops is not None) == (gpu.sm >= 89 or gpu.target.gfx in ("gfx942", "gfx950"))


def described(**properties: int | str) -> object:
    return SimpleNamespace(**{"major": 9, "minor": 0, "multi_processor_count": 66} | properties)


def test_an_unlisted_gpu_takes_its_limits_from_the_driver() -> None:
    gpu = specs.describe("NVIDIA H100 New", described(shared_memory_per_block_optin=200_000))
    assert gpu.smem_per_block == 200_000


def test_an_unlisted_gpu_takes_its_rates_from_its_family_by_multiprocessors() -> None:
    relative = find_gpu("H100")
    gpu = specs.describe("NVIDIA H100 New", described(multi_processor_count=relative.multiprocessors // 2))
    assert gpu.bf16_tflops == relative.bf16_tflops / 2


def test_an_unlisted_gpu_of_an_unknown_family_is_refused() -> None:
    with pytest.raises(GpuError, match="compute capability 75"):
        specs.describe("Tesla T4", described(major=7, minor=5))


def test_an_unlisted_amd_gpu_is_told_by_its_architecture_and_not_by_a_number() -> None:
    """A gfx90a says 9.0, as an H100 does."""
    gpu = specs.describe(
        "AMD Instinct MI210", described(gcnArchName="gfx90a:sramecc+:xnack-", multi_processor_count=55)
    )
    assert (str(gpu.target), gpu.sm, gpu.multiprocessors, gpu.smem_per_block) == ("gfx90a", 0, 55, 65536)
    assert gpu.bf16_tflops == find_gpu("MI250X").bf16_tflops / 2


def test_a_partition_of_an_amd_gpu_has_its_name_and_its_own_units() -> None:
    whole = find_gpu("MI300X")
    part = specs.describe(whole.device_name, described(gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=38))
    assert (part.device_name, part.multiprocessors, part.bf16_tflops) == (whole.device_name, 38, whole.bf16_tflops / 8)


def test_an_amd_gpu_of_another_family_is_refused() -> None:
    with pytest.raises(GpuError, match="gfx1201: expected one of gfx90a, gfx942, gfx950"):
        specs.describe("AMD Radeon RX 9070 XT", described(gcnArchName="gfx1201", major=12))


def test_the_names_of_one_amd_gpu_are_each_others_aliases() -> None:
    assert specs.aliases(find_gpu("MI355X")) == ["AMD Instinct MI355 OAM"]
    assert specs.is_called(find_gpu("MI355X"), "AMD_Instinct_MI355_OAM")
    assert not specs.is_called(find_gpu("MI355X"), "AMD_Instinct_MI350X")


# TFLOP/s of 16 and 8 bits without sparsity, as AMD announced them, to four digits at most.
ANNOUNCED = {
    "MI250X": (191.5, None),
    "MI300X": (1307, 2615),
    "MI325X": (1307, 2615),
    "MI350X": (2307, 4614),
    "MI355X": (2517, 5033),
}


@pytest.mark.parametrize("model", ANNOUNCED)
def test_the_rates_of_an_amd_gpu_are_those_that_were_announced(model: str) -> None:
    gpu, (bf16, fp8) = find_gpu(model), ANNOUNCED[model]
    assert gpu.bf16_tflops == pytest.approx(bf16, rel=1e-3)
    assert gpu.fp8_tflops == (None if fp8 is None else pytest.approx(fp8, rel=1e-3))
