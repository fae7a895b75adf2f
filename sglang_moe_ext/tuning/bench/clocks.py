"""Watch the clocks of the GPU that measures: a GPU that slows itself down measures itself, not the kernel."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

from sglang_moe_ext.core import GpuError

log = logging.getLogger(__name__)

# By what NVML's constants end in. The power cap spoils nothing: heavy matrix work meets it, and would in serving too.
_REASONS = {
    "GpuIdle": "idle",
    "ApplicationsClocksSetting": "application clocks",
    "SwPowerCap": "software power cap",
    "HwSlowdown": "hardware slowdown",
    "SyncBoost": "sync boost",
    "SwThermalSlowdown": "software thermal slowdown",
    "HwThermalSlowdown": "hardware thermal slowdown",
    "HwPowerBrakeSlowdown": "hardware power brake",
    "DisplayClockSetting": "display clocks",
}
SPOILING = frozenset(_REASONS[end] for end in _REASONS if end.endswith("Slowdown"))
# Older drivers and bindings know the second name alone.
_CONSTANTS = ("nvmlClocksEventReason", "nvmlClocksThrottleReason")
_FUNCTIONS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")


@dataclass(frozen=True, slots=True)
class ClockReading:
    """The clock of the multiprocessors, and all that keeps it from being higher."""

    sm_mhz: int
    reasons: frozenset[str]

    @property
    def spoiled(self) -> str | None:
        """What spoils a measurement; None where nothing does."""
        return ", ".join(sorted(self.reasons & SPOILING)) or None


class ClockWatch:
    """Reads the clocks of one GPU through NVML, where that is to be had.

    `device`: the index that CUDA gives it in this process, or its UUID.
    """

    def __init__(self, device: int | str = 0) -> None:
        self._nvml: Any = None
        try:
            nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            log.info("the GPU's clocks are not watched (%s); the package nvidia-ml-py would read them", error)
            return
        try:
            nvml.nvmlInit()
            self._handle = _handle(nvml, device)
            _clocks(nvml, self._handle)
        except (nvml.NVMLError, GpuError) as error:
            log.info("the GPU's clocks are not watched: %s", error)
            return
        self._nvml = nvml

    def read(self) -> ClockReading | None:
        """The clocks now; None where they cannot be known."""
        if self._nvml is None:
            return None
        try:
            return _clocks(self._nvml, self._handle)
        except self._nvml.NVMLError as error:
            log.info("the GPU's clocks are watched no more: %s", error)
            self._nvml = None
            return None


def _clocks(nvml: Any, handle: Any) -> ClockReading:
    return ClockReading(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM), _names(nvml, _bits(nvml, handle)))


def _bits(nvml: Any, handle: Any) -> int:
    newest, *older = (getattr(nvml, name) for name in _FUNCTIONS if hasattr(nvml, name))
    try:
        return int(newest(handle))
    except nvml.NVMLError:
        if not older:
            raise
        return int(older[0](handle))  # newer bindings on an older driver


def _names(nvml: Any, bits: int) -> frozenset[str]:
    names = set()
    for end, name in _REASONS.items():
        mask = next((getattr(nvml, start + end) for start in _CONSTANTS if hasattr(nvml, start + end)), 0)
        if bits & mask:
            names.add(name)
    return frozenset(names)


def _handle(nvml: Any, device: int | str) -> Any:
    """Raises GpuError where NVML has no such GPU, or several."""
    wanted = _known_to_nvml(device)
    if isinstance(wanted, int):
        return nvml.nvmlDeviceGetHandleByIndex(wanted)
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    # CUDA_VISIBLE_DEVICES may have the beginning of a UUID.
    found = [handle for handle in handles if _text(nvml.nvmlDeviceGetUUID(handle)).startswith(wanted)]
    if len(found) != 1:
        raise GpuError(f"NVML has {len(found)} GPUs {wanted}: expected one")
    return found[0]


def _known_to_nvml(device: int | str) -> int | str:
    """The GPU's UUID; or its index with NVML, where CUDA counts as NVML does."""
    if isinstance(device, str):
        return device
    uuid = _uuid_of_torch(device)
    if uuid is not None:
        return uuid
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return device
    entries = [entry.strip() for entry in visible.split(",")]
    if device >= len(entries) or not (entries[device].isdecimal() or entries[device].startswith("GPU-")):
        raise GpuError(f"CUDA_VISIBLE_DEVICES={visible!r} has no GPU of index {device}")
    return int(entries[device]) if entries[device].isdecimal() else entries[device]


def _uuid_of_torch(device: int) -> str | None:
    """The UUID as CUDA has it: CUDA may number GPUs by speed, NVML goes by their place. None before CUDA is in use."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else f"GPU-{uuid}"


def _text(uuid: str | bytes) -> str:
    return uuid.decode() if isinstance(uuid, bytes) else uuid
