"""A tuning run of `kernels.grouped_gemm` over a table of times: what it chooses and writes, and what is read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sglang_moe_ext import env, kernels
from sglang_moe_ext.core import CompileKey, Failure, MoEExtError, MoEShape, Projection, Quantization, TileConfig
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.kernels import expert_gemm
from sglang_moe_ext.tables import config_table, grouped_gemm_table, provenance
from sglang_moe_ext.tuning import grouped_gemm, grouped_gemm_results
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
    Pair,
)
from sglang_moe_ext.tuning.grouped_gemm import GroupedGemmRequest
from sglang_moe_ext.tuning.versions import version_of

H100 = specs.known_gpus()["NVIDIA H100 80GB HBM3"]
BEST = CompileKey(64, 64, 128, 4, 4)


def request_for(**changed: object) -> GroupedGemmRequest:
    given = {
        "name": "hidden size 4096",
        "shape": MoEShape(8, 4096, 4096, 1, gated=False),
        "gpu": H100,
        "rows": (64, 512),
        "effort": "quick",
        "seed": 0,
        "command": "sglang-moe-ext tune --kernel grouped_gemm --hidden-size 4096",
        "output_dir": None,
    }
    return GroupedGemmRequest(**{**given, **changed})  # type: ignore[arg-type]


def us_of(config: TileConfig, fastest: CompileKey | None) -> float:
    return 50.0 if config.compile_key == fastest else 100.0 + config.block_m / 64


class Times:
    """Tiles of the key `fastest` take 50 us, others 100 and more; those of `wrong` give a wrong result."""

    def __init__(self, fastest: CompileKey | None, wrong: CompileKey | None = None) -> None:
        self.fastest, self.wrong = fastest, wrong

    def __call__(self, request: BenchRequest) -> BenchResult:
        match request:
            case BenchGemm(_, _, key, groups, samples, _):
                return GemmTimes(((us_of(key.with_group(1), self.fastest),) * samples,) * len(groups))
            case BenchLayers(_, pairs, rounds):
                return LayerTimes(
                    tuple((us_of(pair["up"], self.fastest),) * rounds for pair in pairs if isinstance(pair, dict)), 4
                )
            case CheckAccuracy(_, pair):
                assert isinstance(pair, dict)
                return Accuracy(1.0 if pair["up"].compile_key == self.wrong else 1e-5)
        raise TypeError(request)


def runs(projection: Projection, key: CompileKey) -> None:
    assert projection == "up", key


def listed_keys(rows: int) -> list[CompileKey]:
    request = request_for()
    tiles = grouped_gemm.list_tiles(request.shape, H100, rows, grouped_gemm.EFFORTS["quick"])
    return list(dict.fromkeys(tile.compile_key for tile in tiles))


def choices(measure: Times, clean: object = runs, **changed: object) -> dict[int, TileConfig]:
    found = grouped_gemm.choose_all(request_for(**changed), measure, clean, lambda *_: None)  # type: ignore[arg-type]
    return {rows: choice.pair["up"] for rows, choice in found.items()}


def test_the_fastest_tile_of_each_number_of_rows_is_chosen() -> None:
    fastest = next(key for key in listed_keys(64) if key in listed_keys(512))
    assert {tile.compile_key for tile in choices(Times(fastest)).values()} == {fastest}


def test_a_fast_wrong_tile_is_never_chosen() -> None:
    fastest = next(key for key in listed_keys(64) if key in listed_keys(512))
    assert all(tile.compile_key != fastest for tile in choices(Times(fastest, wrong=fastest)).values())


def test_the_default_stays_where_nothing_beats_it() -> None:
    default = expert_gemm.default_config(64, 8, request_for().key)
    assert choices(Times(default.compile_key), rows=(64,)) == {64: default}


def test_a_tile_that_does_not_fit_is_never_launched() -> None:
    def nothing_fits(projection: Projection, key: CompileKey) -> Failure:
        return Failure("OutOfResources", "too large")

    default = expert_gemm.default_config(64, 8, request_for().key)
    assert choices(Times(None), nothing_fits, rows=(64,)) == {64: default}


def test_no_right_result_at_all_is_one_error() -> None:
    default = expert_gemm.default_config(64, 8, request_for().key)
    with pytest.raises(MoEExtError, match="no number of rows"):
        choices(Times(None, wrong=default.compile_key), rows=(64,), searches=False)


def chosen(request: GroupedGemmRequest) -> dict[int, grouped_gemm.MeasuredChoice[Pair]]:
    return grouped_gemm.choose_all(request, Times(listed_keys(64)[0]), runs, lambda *_: None)


@pytest.mark.parametrize(
    ("shape", "a"),
    [
        (MoEShape(8, 4096, 4096, 1, gated=False), torch.empty(4, 4096, dtype=torch.bfloat16)),
        (MoEShape(8, 4096, 4096, 1, gated=False, dtype="float16"), torch.empty(4, 4096, dtype=torch.float16)),
        (MoEShape(8, 4096, 4096, 1, gated=False, dtype="float32"), torch.empty(4, 4096)),
        (
            MoEShape(8, 4096, 4096, 1, Quantization("fp8_w8a8", (128, 128))),
            torch.empty(4, 4096, dtype=torch.float8_e4m3fn),
        ),
        (MoEShape(8, 4096, 4096, 1, Quantization("int8_w8a8", per_channel=True)), torch.empty(4, 4096).char()),
        (MoEShape(8, 4096, 4096, 1, Quantization("int8_w8a16", per_channel=True)), torch.empty(4, 4096).bfloat16()),
    ],
    ids=lambda value: str(value) if isinstance(value, MoEShape) else "",
)
def test_the_function_looks_for_the_file_that_the_run_writes(shape: MoEShape, a: torch.Tensor) -> None:
    assert request_for(shape=shape).key == expert_gemm.key_of(a, shape.quantization)


def test_the_name_is_that_of_the_former_script() -> None:
    key = grouped_gemm_table.GroupedGemmKey(4096, "fp8_w8a8", (128, 128))
    assert key.file_name == "grouped_gemm_config_4096_fp8_w8a8_block128x128.json"
    assert request_for().key.file_name == "grouped_gemm_config_4096_bfloat16.json"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(env.STORE, str(tmp_path / "store"))
    grouped_gemm_table.forget()
    return tmp_path / "store"


def test_what_is_written_is_what_the_function_takes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for(output_dir=tmp_path / "out")
    found = chosen(request)
    mine, given = grouped_gemm_results.write(request, found)
    assert given == tmp_path / "out" / request.key.file_name and given.read_text() == mine.read_text()
    assert {entry.origin for entry in provenance.read(mine).entries.values()} == {"measured"}  # type: ignore[union-attr]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100.device_name)
    monkeypatch.setattr(expert_gemm.triton, "__version__", version_of("triton"))
    assert expert_gemm.choose_config(70, 8, request.key, torch.device("cuda")) == found[64].pair["up"]


def test_entries_of_other_rows_stay(store: Path) -> None:
    grouped_gemm_results.write(request_for(rows=(64,)), chosen(request_for(rows=(64,))))
    [path] = grouped_gemm_results.write(request_for(rows=(512,)), chosen(request_for(rows=(512,))))
    assert sorted(config_table.read(path)) == [64, 512]


def test_a_broken_table_costs_a_warning_and_the_default_runs(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = request_for().key
    path = grouped_gemm_table.folder(store, H100.device_name, "3.6.0") / key.file_name
    path.parent.mkdir(parents=True)
    path.write_text('{"64": 3}')
    assert grouped_gemm_table.load(key, H100.device_name, "3.6.0") == {}
    assert "default" in caplog.text


def test_the_document_is_json_and_states_no_floor_of_float32(store: Path) -> None:
    for shape in (request_for().shape, MoEShape(8, 4096, 4096, 1, gated=False, dtype="float32")):
        request = request_for(shape=shape, rows=(64,))
        document = json.loads(json.dumps(grouped_gemm_results.document(request, chosen(request), ())))
        assert (document["rows"]["64"]["floor_us"] is None) == (shape.dtype == "float32")


def test_the_package_has_the_function_and_loads_nothing_for_its_name() -> None:
    assert kernels.grouped_gemm is expert_gemm.grouped_gemm
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kernels.nothing  # noqa: B018


def test_a_run_compiles_its_tiles_measures_and_keeps_a_journal(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Process(Times):
        def __init__(self, setup: object) -> None:
            super().__init__(None)

        def measure(self, request: BenchRequest) -> BenchResult:
            return self(request)

        def close(self) -> None: ...

    monkeypatch.setattr(grouped_gemm, "BenchProcess", Process)
    monkeypatch.setattr(grouped_gemm, "list_tiles", lambda *_: [BEST.with_group(1)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(store))
    found = grouped_gemm.run(request_for(rows=(64,)), lambda *_: None)
    assert found[64].tried == 1 and not found[64].failures
    [journal] = (store / "runs").glob("*/journal.jsonl")
    assert journal.read_text().endswith('{"end":true}\n')
