"""The watch for throttling, with a stand-in for NVML's Python binding: no GPU is needed, and none is measured."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_moe_ext.tuning.bench.clocks import ClockReading, ClockWatch

BITS = {
    "GpuIdle": 0x1,
    "ApplicationsClocksSetting": 0x2,
    "SwPowerCap": 0x4,
    "HwSlowdown": 0x8,
    "SyncBoost": 0x10,
    "SwThermalSlowdown": 0x20,
    "HwThermalSlowdown": 0x40,
    "HwPowerBrakeSlowdown": 0x80,
    "DisplayClockSetting": 0x100,
}
UUIDS = ("GPU-aaaa1111-0000", "GPU-aaaa2222-0000", "GPU-bbbb3333-0000")


class FakeError(Exception):
    """What this NVML raises."""


class FakeNvml:
    """Three GPUs that run at 1000, 1001 and 1002 MHz; `names` are the generations of names that it knows."""

    NVML_CLOCK_SM = 1
    NVMLError = FakeError

    def __init__(self, bits: int = 0, names: tuple[str, ...] = ("Event", "Throttle")) -> None:
        self.bits = bits
        self.refuses: set[str] = set()
        for name in names:
            for end, mask in BITS.items():
                setattr(self, f"nvmlClocks{name}Reason{end}", mask)
            setattr(self, f"nvmlDeviceGetCurrentClocks{name}Reasons", self.reasons_of(f"{name} reasons"))

    def asked(self, what: str) -> None:
        if what in self.refuses:
            raise FakeError(f"{what}: not supported")

    def reasons_of(self, what: str) -> Any:
        def reasons(_: int) -> int:
            self.asked(what)
            return self.bits

        return reasons

    def nvmlInit(self) -> None:
        self.asked("init")

    def nvmlDeviceGetCount(self) -> int:
        return len(UUIDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index not in range(len(UUIDS)):
            raise FakeError(f"no GPU {index}")
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str | bytes:
        return UUIDS[handle]

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:
        assert clock == self.NVML_CLOCK_SM
        self.asked("clock")
        return 1000 + handle


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def installed(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> FakeNvml:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def watched(device: int | str = 0) -> int | None:
    """Which GPU the watch reads, by its clock."""
    clocks = ClockWatch(device).read()
    return None if clocks is None else clocks.sm_mhz - 1000


@pytest.mark.parametrize("end", ["HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown"])
def test_a_slowdown_spoils_a_measurement(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    installed(monkeypatch, FakeNvml(BITS[end]))
    clocks = ClockWatch().read()
    assert clocks is not None and len(clocks.reasons) == 1 and clocks.spoiled == next(iter(clocks.reasons))


@pytest.mark.parametrize(
    "end", ["GpuIdle", "ApplicationsClocksSetting", "SwPowerCap", "SyncBoost", "DisplayClockSetting"]
)
def test_what_is_normal_under_work_is_told_and_spoils_nothing(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    installed(monkeypatch, FakeNvml(BITS[end]))
    clocks = ClockWatch().read()
    assert clocks is not None and len(clocks.reasons) == 1 and clocks.spoiled is None


def test_of_several_reasons_those_that_spoil_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, FakeNvml(BITS["SwPowerCap"] | BITS["HwSlowdown"] | BITS["HwThermalSlowdown"]))
    clocks = ClockWatch().read()
    assert clocks is not None and clocks.spoiled == "hardware slowdown, hardware thermal slowdown"


def test_a_gpu_at_full_clocks_has_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, FakeNvml())
    assert ClockWatch().read() == ClockReading(1000, frozenset())


def test_a_bit_that_nobody_knows_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, FakeNvml(0x4000))
    assert ClockWatch().read() == ClockReading(1000, frozenset())


def test_each_read_is_of_its_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = installed(monkeypatch, FakeNvml())
    watch = ClockWatch()
    nvml.bits = BITS["HwThermalSlowdown"]
    clocks = watch.read()
    assert clocks is not None and clocks.spoiled == "hardware thermal slowdown"


@pytest.mark.parametrize("names", [("Event",), ("Throttle",)], ids=["new names", "old names"])
def test_either_generation_of_names_will_do(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    installed(monkeypatch, FakeNvml(BITS["HwSlowdown"], names))
    clocks = ClockWatch().read()
    assert clocks is not None and clocks.spoiled == "hardware slowdown"


def test_on_a_driver_older_than_the_binding_the_old_function_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, FakeNvml(BITS["HwSlowdown"])).refuses.add("Event reasons")
    clocks = ClockWatch().read()
    assert clocks is not None and clocks.spoiled == "hardware slowdown"


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [
        (None, 1, 1),
        ("2,0", 0, 2),
        ("2,0", 1, 0),
        (" 2 , 0 ", 0, 2),
        (UUIDS[2], 0, 2),
        (f"{UUIDS[1]},{UUIDS[0]}", 1, 0),
        ("GPU-bbbb", 0, 2),
        (None, UUIDS[1], 1),
        ("0", UUIDS[1], 1),
    ],
)
def test_the_gpu_is_the_one_that_cuda_calls_so(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, device: int | str, expected: int
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    installed(monkeypatch, FakeNvml())
    assert watched(device) == expected


@pytest.mark.parametrize(
    ("visible", "device"),
    [
        ("", 0),
        ("0", 1),
        ("-1", 0),
        ("9", 0),
        ("GPU-aaaa", 0),
        ("GPU-cccc", 0),
        ("MIG-aaaa1111-0000", 0),
        (None, "GPU-c"),
    ],
    ids=[
        "none",
        "too few",
        "minus one",
        "no such index",
        "two of that beginning",
        "no such UUID",
        "MIG",
        "by its UUID",
    ],
)
def test_a_gpu_that_nvml_cannot_tell_is_not_watched(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, device: int | str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    installed(monkeypatch, FakeNvml())
    assert watched(device) is None


def test_uuids_may_be_bytes_as_older_bindings_give_them(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = installed(monkeypatch, FakeNvml())
    monkeypatch.setattr(nvml, "nvmlDeviceGetUUID", lambda handle: UUIDS[handle].encode())
    assert watched(UUIDS[2]) == 2


def fake_torch(initialized: bool) -> Any:
    """A torch whose device 0 is NVML's last, as CUDA numbers GPUs where that is the fastest."""
    properties = SimpleNamespace(uuid=UUIDS[2].removeprefix("GPU-"))
    return SimpleNamespace(
        cuda=SimpleNamespace(is_initialized=lambda: initialized, get_device_properties=lambda _: properties)
    )


@pytest.mark.parametrize(("initialized", "expected"), [(True, 2), (False, 0)], ids=["in use", "not in use"])
def test_where_cuda_is_in_use_its_own_word_on_the_gpu_counts(
    monkeypatch: pytest.MonkeyPatch, initialized: bool, expected: int
) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch(initialized))
    installed(monkeypatch, FakeNvml())
    assert watched(0) == expected


def test_without_the_binding_nothing_is_known_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with caplog.at_level(logging.INFO, "sglang_moe_ext.tuning.bench.clocks"):
        watch = ClockWatch()
        assert (watch.read(), watch.read()) == (None, None)
    [record] = caplog.records
    assert record.levelno == logging.INFO and "the package nvidia-ml-py would read them" in record.getMessage()


@pytest.mark.parametrize("refused", ["init", "clock"])
def test_where_nvml_refuses_nothing_is_known_and_one_line_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refused: str
) -> None:
    installed(monkeypatch, FakeNvml()).refuses.add(refused)
    with caplog.at_level(logging.INFO, "sglang_moe_ext.tuning.bench.clocks"):
        watch = ClockWatch()
        assert (watch.read(), watch.read()) == (None, None)
    assert [record.getMessage() for record in caplog.records] == [
        f"the GPU's clocks are not watched: {refused}: not supported"
    ]


def test_an_nvml_that_fails_later_is_given_up_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = installed(monkeypatch, FakeNvml())
    watch = ClockWatch()
    nvml.refuses.add("clock")
    with caplog.at_level(logging.INFO, "sglang_moe_ext.tuning.bench.clocks"):
        assert (watch.read(), watch.read()) == (None, None)
    assert [record.getMessage() for record in caplog.records] == [
        "the GPU's clocks are watched no more: clock: not supported"
    ]
