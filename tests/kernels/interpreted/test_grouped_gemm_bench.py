"""The bench of `kernels.grouped_gemm` on real operands, with a clock that only counts."""

import pytest

from sglang_moe_ext.core import CompileKey, MoEShape, Quantization, TileConfig
from sglang_moe_ext.tuning.bench.grouped_gemm_bench import GroupedGemmBench
from sglang_moe_ext.tuning.bench.messages import Accuracy, BenchGemm, BenchLayers, CheckAccuracy, GemmTimes, LayerTimes
from sglang_moe_ext.tuning.bench.timer import LaunchQueue

TILE = TileConfig(16, 16, 32, 1, 4, 2)


class Event:
    def record(self) -> None: ...

    def query(self) -> bool:
        return False

    def elapsed_time(self, end_event: object) -> float:
        return 0.01


def bench(quantization: Quantization) -> GroupedGemmBench:
    queue = LaunchQueue(event=Event, sleep=lambda cycles: None, flush=lambda: None, synchronize=lambda: None)
    return GroupedGemmBench(MoEShape(4, 20, 64, 2, quantization), 0, queue, device="cpu")


@pytest.mark.parametrize(
    "quantization",
    [Quantization(), Quantization("fp8_w8a8", (32, 32)), Quantization("int8_w8a16", per_channel=True)],
    ids=str,
)
def test_each_request_has_its_answer_and_the_result_is_right(quantization: Quantization) -> None:
    measured = bench(quantization)
    gemm = measured.measure(BenchGemm(9, "up", CompileKey(16, 16, 32, 4, 2), (1, 8), 2))
    assert isinstance(gemm, GemmTimes) and [len(of_group) for of_group in gemm.us] == [2, 2]
    layers = measured.measure(BenchLayers(9, ({"up": TILE, "down": TILE},) * 2, 2))
    assert isinstance(layers, LayerTimes) and layers.us == ((10.0, 10.0),) * 2
    accuracy = measured.measure(CheckAccuracy(9, {"up": TILE, "down": TILE}))
    assert isinstance(accuracy, Accuracy) and accuracy.error < 2.5e-3


def test_a_first_sample_above_the_limit_is_the_last_one() -> None:
    gemm = bench(Quantization()).measure(BenchGemm(9, "up", CompileKey(16, 16, 32, 4, 2), (1, 8), 2, limit_us=5.0))
    assert isinstance(gemm, GemmTimes) and gemm.us == ((10.0,), ())
