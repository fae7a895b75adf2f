"""By how much the cost model overstates a gain, from a measurement, and so which predicted gain counts as one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckedGain:
    """One batch size: the gain of a predicted table over the engine's default, as predicted and as measured."""

    tokens: int
    predicted: float
    measured: float

    @property
    def overstated(self) -> float:
        """How many times too large the predicted gain is; at least 1."""
        return max(1.0, self.predicted / self.measured)


FEW_TOKENS = 64
"""Up to here a layer reads weights and computes little; the model's errors are others above."""

# docs/prediction.md, "A predicted table against a measured one": GLM-4.7-Flash on an NVIDIA H200, SGLang 0.5.15,
# Triton 3.6.0, 2026-11-21. Measured: today us / predicted us; predicted: the same two configurations by the model.
CHECKED = (
    CheckedGain(1, 1.296, 1.040),
    CheckedGain(2, 1.099, 0.933),
    CheckedGain(4, 1.028, 0.978),
    CheckedGain(8, 1.036, 1.085),
    CheckedGain(16, 1.040, 0.978),
    CheckedGain(24, 1.039, 1.028),
    CheckedGain(32, 1.039, 0.995),
    CheckedGain(48, 1.041, 0.985),
    CheckedGain(64, 1.044, 0.990),
    CheckedGain(96, 1.440, 1.370),
    CheckedGain(128, 1.437, 1.416),
    CheckedGain(256, 1.450, 1.445),
    CheckedGain(512, 1.491, 1.495),
    CheckedGain(1024, 1.673, 1.457),
    CheckedGain(1536, 1.987, 1.628),
    CheckedGain(2048, 1.990, 1.601),
    CheckedGain(3072, 2.157, 1.692),
    CheckedGain(4096, 2.273, 1.754),
    CheckedGain(8192, 2.451, 1.854),
    CheckedGain(16384, 2.556, 2.000),
)


def margin(tokens: int) -> float:
    """The predicted gain that a candidate must exceed at that M: the worst overstatement at few, or at many, tokens."""
    few = tokens <= FEW_TOKENS
    return max(checked.overstated for checked in CHECKED if (checked.tokens <= FEW_TOKENS) == few)
