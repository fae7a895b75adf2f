"""Names of GPUs as people write them, and what they mean (public reports, and tables that the engines ship)."""

from __future__ import annotations

import pytest

from sglang_moe_ext.core import GpuError
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.gpu.names import find_gpu

MEANT = {
    "NVIDIA L20": ("NVIDIA L20", 89),
    "NVIDIA_L20Y": ("NVIDIA L20Y", 89),
    "NVIDIA RTX 5880 Ada Generation": ("NVIDIA RTX 5880 Ada Generation", 89),
    "NVIDIA RTX A5000": ("NVIDIA RTX A5000", 86),
    "H200-SXM-141GB": ("NVIDIA H200", 90),
    "NVIDIA A40": ("NVIDIA A40", 86),
    "NVIDIA A800 80GB PCIe": ("NVIDIA A800 80GB PCIe", 80),
    "NVIDIA H800 PCIe": ("NVIDIA H800 PCIe", 90),
    "NVIDIA GeForce RTX 5070 Ti": ("NVIDIA GeForce RTX 5070 Ti", 120),
    "NVIDIA GeForce RTX 3090 Ti": ("NVIDIA GeForce RTX 3090 Ti", 86),
    "NVIDIA RTX PRO 5000 72GB Blackwell": ("NVIDIA RTX PRO 5000 72GB Blackwell", 120),
    "NVIDIA GH200 144G HBM3e": ("NVIDIA GH200 144G HBM3e", 90),
    "4090": ("NVIDIA GeForce RTX 4090", 89),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 89),
    "4090D": ("NVIDIA GeForce RTX 4090 D", 89),
    "RTX 5880 Ada": ("NVIDIA RTX 5880 Ada Generation", 89),
    "A5000": ("NVIDIA RTX A5000", 86),
    "A30": ("NVIDIA A30", 80),
    "H100-PCIE-80GB": ("NVIDIA H100 PCIe", 90),
    "H100 SXM5": ("NVIDIA H100 80GB HBM3", 90),
    "GB200 NVL72": ("NVIDIA GB200", 100),
    "5090": ("NVIDIA GeForce RTX 5090", 120),
    "pro 6000": ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 120),
    "RTX PRO 6000 Max-Q": ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 120),
    "RTX 6000": ("NVIDIA RTX 6000 Ada Generation", 89),
    "B200 192GB": ("NVIDIA B200", 100),
    "H20-96GB": ("NVIDIA H20", 90),
}


@pytest.mark.parametrize(("said", "meant"), MEANT.items(), ids=MEANT)
def test_a_name_that_people_use_means_one_gpu(said: str, meant: tuple[str, int]) -> None:
    gpu = find_gpu(said)
    assert (gpu.device_name, gpu.sm) == meant


SLICES = {
    "NVIDIA A100-SXM4-80GB MIG 3g.40gb": (80, 42, 40),
    "NVIDIA_H100_80GB_HBM3_MIG_1g.10gb": (90, 16, 10),
    "H200 MIG 3g.71gb": (90, 60, 71),
}


@pytest.mark.parametrize(("said", "slice_facts"), SLICES.items(), ids=SLICES)
def test_a_mig_slice_has_the_limits_of_the_whole_and_its_own_multiprocessors(
    said: str, slice_facts: tuple[int, int, int]
) -> None:
    gpu = find_gpu(said)
    assert (gpu.sm, gpu.multiprocessors, gpu.memory_gib) == slice_facts
    assert gpu.smem_per_block == specs.ARCHITECTURES[gpu.sm].smem_per_block


def test_the_name_of_a_mig_slice_keeps_its_profile() -> None:
    assert find_gpu("A100-SXM4-80GB MIG 3g.40gb").device_name == "NVIDIA A100-SXM4-80GB MIG 3g.40gb"


def test_a_profile_that_is_larger_than_the_gpu_is_refused() -> None:
    with pytest.raises(GpuError, match=r"no MIG profile 3g\.71gb"):
        find_gpu("NVIDIA A100-SXM4-40GB MIG 3g.71gb")


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        ("A100 40GB", ("NVIDIA_A100-SXM4-40GB", "NVIDIA_A100-PCIE-40GB")),
        ("RTX PRO 6000 Blackwell", ("Server_Edition", "Workstation_Edition")),
    ],
)
def test_a_name_of_several_gpus_is_asked_back_with_their_names(said: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(GpuError, match="may be") as refused:
        find_gpu(said)
    assert all(part in str(refused.value) for part in parts)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("Tesla T4", "7.5"),
        ("Quadro RTX 6000", "7.5"),
        ("RTX 2080 Ti", "7.5"),
        ("Tesla V100-SXM2-32GB", "7.0"),
        ("AMD_Instinct_MI300A", "AMD"),
        ("AMD_Radeon_Graphics", "AMD"),
        ("Radeon RX 7900 XTX", "AMD"),
        ("Gaudi 3", "Intel"),
        ("Jetson AGX Thor", "11.0"),
        ("NVIDIA Thor", "11.0"),
        ("IGX_Thor", "11.0"),
        ("Jetson T5000", "11.0"),
        ("sm_110", "11.0"),
        ("sm_101", "11.0"),
        ("Jetson AGX Orin", "8.7"),
    ],
)
def test_an_unsupported_gpu_is_said_to_be_unsupported_and_why(said: str, why: str) -> None:
    with pytest.raises(GpuError, match="is not supported") as refused:
        find_gpu(said)
    assert why in str(refused.value)
    assert "such as" not in str(refused.value)


# Further names, written before they were tried.
@pytest.mark.parametrize(
    ("said", "device_name", "multiprocessors"),
    [
        ("NVIDIA L40S-48Q", "NVIDIA L40S-48Q", 142),
        ("GRID A100-40C", "GRID A100-40C", 108),
        ("NVIDIA H200 MIG 1c.3g.71gb", "NVIDIA H200 MIG 1c.3g.71gb", 16),
        ("HGX H200", "NVIDIA H200", 132),
        ("NVIDIA A2", "NVIDIA A2", 10),
        ("5060ti", "NVIDIA GeForce RTX 5060 Ti", 36),
        ("H100-NVL-94GB", "NVIDIA H100 NVL", 132),
        ("RTX PRO 6000 Server", "NVIDIA RTX PRO 6000 Blackwell Server Edition", 188),
    ],
)
def test_further_names_of_the_same_kinds_are_found(said: str, device_name: str, multiprocessors: int) -> None:
    gpu = find_gpu(said)
    assert (gpu.device_name, gpu.multiprocessors) == (device_name, multiprocessors)


@pytest.mark.parametrize("said", ["A100 PCIe", "A100 SXM", "NVIDIA GeForce RTX 4080 Laptop GPU", "RTX A6000 Ada"])
def test_a_name_that_is_no_one_gpu_brings_names_that_are(said: str) -> None:
    with pytest.raises(GpuError, match=r"may be NVIDIA_A100|such as NVIDIA_"):
        find_gpu(said)


def test_a_rebuilt_card_has_the_name_of_the_original_and_its_own_memory() -> None:
    gpu = find_gpu("RTX 4090 48GB")
    assert (gpu.device_name, gpu.memory_gib) == ("NVIDIA GeForce RTX 4090", 48)
