"""Which table a layer's configuration comes from, for tables that are whole, odd or broken."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import Gpu, MoEShape, Origin, Quantization, Table, TileConfig
from sglang_moe_ext.engines.sglang import table_names
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.serving import table_search, table_selection
from sglang_moe_ext.serving.table_search import FoundTables, TableCandidate, TableDir
from sglang_moe_ext.serving.table_selection import Choice, EngineDefault, EngineEntry, OurEntry
from sglang_moe_ext.tables import config_table, files, provenance
from sglang_moe_ext.tables.provenance import Provenance, ProvenanceEntry
from tests.tables.generated import A_RUN

SHAPE = MoEShape(8, 256, 512, 2)
TRITON, OLDER_TRITON = "3.7.1", "3.5.1"
H200, H200_NVL = find_gpu("H200"), find_gpu("H200 NVL")
YOURS, SHIPPED = TableDir("your", Path("yours")), TableDir("the shipped", Path("shipped"))
ENGINES = TableDir("the engine's", Path("engines"), is_engines=True)
ASKED_FOR = dataclasses.replace(ENGINES, is_asked_for=True)


def config(mark: int = 1, **changes: Any) -> TileConfig:
    """A configuration that is told from others by its GROUP_SIZE_M."""
    return dataclasses.replace(TileConfig(16, 64, 64, mark, 4, 3), **changes)


def known(table: Table, origin: Origin = "measured", shape: str = str(SHAPE)) -> Provenance:
    return Provenance(dict.fromkeys(table, ProvenanceEntry(origin, dataclasses.replace(A_RUN, shape=shape))))


def write(
    root: Path,
    table: Table,
    made: Provenance | None,
    *,
    triton: str = TRITON,
    device_name: str = H200.device_name,
    down: bool = False,
    shape: MoEShape = SHAPE,
) -> Path:
    """Put a table there as a tuner does, or as a stranger does where nothing is said of how it was made."""
    key = table_names.table_key(shape, device_name, down=down)
    path = root / table_names.version_folder(triton) / table_names.file_name(key)
    said = {} if made is None else {provenance.sidecar(path): provenance.to_json(made)}
    files.write_together({path: config_table.to_json(table), **said})
    return path


def at(table_dir: TableDir, root: Path) -> TableDir:
    return dataclasses.replace(table_dir, root=root)


def choice(table_dirs: list[TableDir], tokens: int = 64, gpu: Gpu = H200, shape: MoEShape = SHAPE) -> Choice:
    return table_selection.select(table_search.search(shape, gpu.device_name, gpu, TRITON, table_dirs), tokens)


def mark_of(chosen: Choice) -> int:
    assert isinstance(chosen, OurEntry), chosen
    return chosen.up.group_m


def candidate(
    table_dir: TableDir = YOURS,
    origin: Origin | None = "measured",
    *,
    alias: bool = False,
    exact: bool = True,
    keys: tuple[int, ...] = (64,),
    mark: int = 1,
) -> TableCandidate:
    table: Table = dict.fromkeys(keys, config(mark))
    made = None if origin is None else known(table, origin)
    folder = table_names.version_folder(TRITON if exact else OLDER_TRITON)
    return TableCandidate(table_dir, table_dir.root / folder / "table.json", "a GPU", alias, exact, table, made, None)


def standing(chosen: TableCandidate) -> tuple[bool, ...]:
    """What it is better for than another, the weightiest first."""
    is_predicted = chosen.known is not None and chosen.known.origin(64) == "predicted"
    return chosen.table_dir.is_asked_for, not is_predicted, not chosen.is_alias, chosen.is_exact_triton


PAIRS = {
    "asked-for-before-yours": (candidate(ASKED_FOR, "predicted", exact=False), candidate(YOURS)),
    "measured-before-predicted": (candidate(alias=True, exact=False), candidate(origin="predicted")),
    "unknown-before-predicted": (candidate(origin=None), candidate(origin="predicted")),
    "this-gpu-before-its-like": (candidate(exact=False), candidate(alias=True)),
    "this-triton-before-others": (candidate(ENGINES), candidate(YOURS, exact=False)),
    "yours-before-shipped": (candidate(YOURS), candidate(SHIPPED)),
    "shipped-before-the-engines": (candidate(SHIPPED), candidate(ENGINES)),
    "covering-before-measured": (candidate(origin="predicted"), candidate(keys=(4096,))),
}


@pytest.mark.parametrize(("first", "second"), PAIRS.values(), ids=PAIRS)
def test_the_better_of_two_tables_is_taken(first: TableCandidate, second: TableCandidate) -> None:
    better, worse = (
        dataclasses.replace(first, up={64: config(1)}),
        dataclasses.replace(second, up=dict.fromkeys(second.up, config(2))),
    )
    order = [
        it for table_dir in (YOURS, SHIPPED, ASKED_FOR, ENGINES) for it in (worse, better) if it.table_dir == table_dir
    ]
    assert mark_of(table_selection.select(FoundTables(tuple(order)), 64)) == 1


any_candidate = st.builds(
    candidate,
    st.sampled_from([YOURS, SHIPPED, ENGINES]),
    st.sampled_from(["measured", "predicted"]),
    alias=st.booleans(),
    exact=st.booleans(),
)


@given(st.lists(any_candidate, min_size=1, max_size=6))
def test_no_table_that_is_left_stands_higher_than_the_one_that_is_taken(found: list[TableCandidate]) -> None:
    found.sort(key=lambda it: [YOURS, SHIPPED, ENGINES].index(it.table_dir))
    marked = [dataclasses.replace(it, up={64: config(mark)}) for mark, it in enumerate(found, start=1)]
    taken = mark_of(table_selection.select(FoundTables(tuple(marked)), 64)) - 1
    assert standing(found[taken]) == max(map(standing, found))
    assert all(standing(it) < standing(found[taken]) for it in found[:taken])


def test_a_table_of_the_engines_own_that_stands_first_is_left_to_the_engine() -> None:
    found = FoundTables((candidate(YOURS, exact=False), candidate(ENGINES, None)))
    assert isinstance(table_selection.select(found, 64), EngineEntry)


@pytest.mark.parametrize("tokens", [1, 16384])
def test_a_table_of_the_engines_own_is_left_to_the_engine_for_any_number_of_tokens(tokens: int) -> None:
    assert isinstance(table_selection.select(FoundTables((candidate(ENGINES, None),)), tokens), EngineEntry)


def test_a_measured_table_of_yours_goes_before_the_engines_own() -> None:
    assert mark_of(table_selection.select(FoundTables((candidate(YOURS, mark=2), candidate(ENGINES, None))), 64)) == 2


def test_a_table_of_the_engines_that_it_would_not_read_itself_is_read_for_it() -> None:
    ours_far = candidate(ENGINES, keys=(4096,))
    theirs = candidate(ENGINES, None, exact=False, mark=3)
    assert mark_of(table_selection.select(FoundTables((ours_far, theirs)), 64)) == 3


KEYS_MIDDLE, KEYS_TO_SATURATION = (256, 512, 1024), (256, 1024, 4096)


@pytest.mark.parametrize(
    ("keys", "tokens", "covered"),
    [
        (KEYS_MIDDLE, 1, False),
        (KEYS_MIDDLE, 127, False),
        (KEYS_MIDDLE, 128, True),
        (KEYS_MIDDLE, 2048, True),
        (KEYS_MIDDLE, 2049, False),
        (KEYS_MIDDLE, 8192, False),
        (KEYS_TO_SATURATION, 8193, True),
        (KEYS_TO_SATURATION, 1 << 20, True),
        (KEYS_TO_SATURATION, 1, False),
        ((1, 4096), 2048, False),
        ((1, 4096), 2049, True),
    ],
)
def test_a_table_covers_what_lies_within_twice_its_keys_and_all_beyond_saturation(
    keys: tuple[int, ...], tokens: int, covered: bool
) -> None:
    assert table_selection.covers(dict.fromkeys(keys, config()), tokens) == covered


@pytest.mark.parametrize(
    ("table_dir", "expected"), [(ENGINES, EngineDefault), (YOURS, EngineEntry)], ids=["engines", "yours"]
)
@pytest.mark.parametrize("tokens", [1, 8192])
def test_an_uncovered_number_of_tokens_runs_no_far_neighbour(table_dir: TableDir, expected: type, tokens: int) -> None:
    assert isinstance(table_selection.select(FoundTables((candidate(table_dir, keys=KEYS_MIDDLE),)), tokens), expected)


def test_few_lines_say_what_is_chosen_for_all_numbers_of_tokens() -> None:
    found = FoundTables((candidate(ENGINES, keys=KEYS_MIDDLE), candidate(SHIPPED, "predicted", keys=(16, 32))))
    assert len({table_selection.select(found, tokens).why for tokens in range(1, 9000)}) == 3


OTHER_LAYERS = {
    "hidden-size": dataclasses.replace(SHAPE, hidden_size=1024),
    "top-k": dataclasses.replace(SHAPE, top_k=4),
}


@pytest.mark.parametrize("other", OTHER_LAYERS.values(), ids=OTHER_LAYERS)
@pytest.mark.parametrize(
    ("table_dir", "expected"), [(ENGINES, EngineDefault), (YOURS, EngineEntry)], ids=["engines", "yours"]
)
def test_a_table_for_another_layer_of_the_same_file_name_is_not_used(
    tmp_path: Path, other: MoEShape, table_dir: TableDir, expected: type
) -> None:
    table = {64: config()}
    write(tmp_path, table, known(table, shape=str(other)))
    assert isinstance(choice([at(table_dir, tmp_path)]), expected)


LAYERS = {
    "bf16": SHAPE,
    "fewer-experts-than-top-k": dataclasses.replace(SHAPE, experts=1, ep=8),
    "no-gate": dataclasses.replace(SHAPE, gated=False),
    "fp8-block": dataclasses.replace(SHAPE, quantization=Quantization("fp8_w8a8", (128, 128))),
    "int4": dataclasses.replace(SHAPE, quantization=Quantization("int4_w4a16", (0, 128))),
    "int4-of-unknown-groups": dataclasses.replace(SHAPE, quantization=Quantization("int4_w4a16")),
}


@pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS)
def test_a_table_for_this_very_layer_is_used(tmp_path: Path, shape: MoEShape) -> None:
    table = {64: config()}
    write(tmp_path, table, known(table, shape=str(shape)), shape=shape)
    assert isinstance(choice([at(YOURS, tmp_path)], shape=shape), OurEntry)


@pytest.mark.parametrize("shape", ["", "something else", None, 5], ids=str)
def test_a_table_for_nobody_knows_which_layer_is_not_used(tmp_path: Path, shape: Any) -> None:
    table = {64: config()}
    write(tmp_path, table, known(table, shape=shape))
    assert isinstance(choice([at(YOURS, tmp_path)]), EngineEntry)


def test_of_a_table_for_two_layers_each_takes_its_own_entries(tmp_path: Path) -> None:
    table = {32: config(1), 64: config(2)}
    other = known({64: config(2)}, shape=str(OTHER_LAYERS["top-k"]))
    write(tmp_path, table, Provenance(known({32: config(1)}).entries | other.entries))
    assert mark_of(choice([at(YOURS, tmp_path)], 64)) == 1


def test_a_gpu_takes_the_tables_of_one_with_the_same_limits_and_says_so(tmp_path: Path) -> None:
    table = {64: config()}
    write(tmp_path, table, known(table))
    chosen = choice([at(SHIPPED, tmp_path)], gpu=H200_NVL)
    assert isinstance(chosen, OurEntry)
    assert "made for NVIDIA H200" in chosen.why


def test_a_gpu_takes_the_engines_own_table_of_one_with_the_same_limits(tmp_path: Path) -> None:
    write(tmp_path, {64: config(4)}, None)
    assert mark_of(choice([at(ENGINES, tmp_path)], gpu=H200_NVL)) == 4


@pytest.mark.parametrize("multiprocessors", [132, 16])
def test_a_slice_of_a_gpu_takes_its_tables_if_it_is_all_of_it(tmp_path: Path, multiprocessors: int) -> None:
    table = {64: config()}
    write(tmp_path, table, known(table))
    part = dataclasses.replace(H200, device_name="NVIDIA H200 MIG 1g.18gb", multiprocessors=multiprocessors)
    assert isinstance(choice([at(SHIPPED, tmp_path)], gpu=part), OurEntry) == (multiprocessors == 132)


def test_a_gpu_that_nothing_is_known_of_takes_tables_of_its_own_name_alone(tmp_path: Path) -> None:
    table = {64: config()}
    write(tmp_path, table, known(table), device_name="AMD Instinct MI300X")
    found = table_search.search(SHAPE, "AMD Instinct MI300X", None, TRITON, [at(YOURS, tmp_path)])
    assert [it.device_name for it in found.candidates] == ["AMD Instinct MI300X"]


def test_a_table_of_another_triton_is_used_and_named(tmp_path: Path) -> None:
    table = {64: config()}
    write(tmp_path, table, known(table), triton=OLDER_TRITON)
    chosen = choice([at(SHIPPED, tmp_path)])
    assert isinstance(chosen, OurEntry)
    assert chosen.why.endswith("(measured, made with triton_3_5_1)")


def test_of_other_tritons_the_newest_is_taken(tmp_path: Path) -> None:
    for mark, triton in enumerate(("3.10.0", "3.9.0", "3.2.0"), start=1):
        table = {64: config(mark)}
        write(tmp_path, table, known(table), triton=triton)
    assert mark_of(choice([at(SHIPPED, tmp_path)])) == 1


@pytest.mark.parametrize(("block_m", "used"), [(16, True), (32, False)])
def test_an_entry_for_the_down_projection_is_used_where_both_sort_alike(
    tmp_path: Path, block_m: int, used: bool
) -> None:
    up, down = {64: config()}, {64: config(7, block_m=block_m), 4096: config(7, block_m=128)}
    write(tmp_path, up, known(up))
    write(tmp_path, down, known(down), down=True)
    chosen = choice([at(YOURS, tmp_path)])
    assert isinstance(chosen, OurEntry)
    assert (chosen.down, chosen.most_block_m) == (down[64] if used else None, 128)


def test_a_table_cut_off_at_any_byte_is_passed_over_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole = {64: config(1)}, {64: config(2)}
    path = write(tmp_path / "yours", broken, known(broken))
    write(tmp_path / "shipped", whole, known(whole))
    text = path.read_bytes()
    table_dirs = [at(YOURS, tmp_path / "yours"), at(SHIPPED, tmp_path / "shipped")]
    for length in range(len(text.rstrip())):
        path.write_bytes(text[:length])
        caplog.clear()
        assert (mark_of(choice(table_dirs)), len(caplog.messages)) == (2, 1), length
    path.write_bytes(text)
    assert mark_of(choice(table_dirs)) == 1


def test_provenance_cut_off_at_any_byte_makes_a_table_of_unknown_origin(tmp_path: Path) -> None:
    table = {64: config()}
    path = provenance.sidecar(write(tmp_path, table, known(table)))
    text = path.read_bytes()
    for length in range(len(text.rstrip())):
        path.write_bytes(text[:length])
        assert "origin unknown" in choice([at(YOURS, tmp_path)]).why, length


def a_folder(path: Path) -> None:
    path.mkdir()


def too_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 32)


def unreadable(path: Path) -> None:
    path.symlink_to("/proc/self/mem")  # there, and each read of its beginning fails, for root too


ODD = {"folder": a_folder, "too-large": too_large, "unreadable": unreadable}


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_what_is_no_table_is_passed_over_with_one_line(
    tmp_path: Path, make: Any, down: bool, caplog: pytest.LogCaptureFixture
) -> None:
    table, whole = {64: config(1)}, {64: config(2)}
    up_path = write(tmp_path / "yours", table, known(table))
    path = write(tmp_path / "yours", table, known(table), down=down)
    path.unlink()
    make(path)
    write(tmp_path / "shipped", whole, known(whole))
    # A sound table of the up projection is not lost for what lies beside it.
    taken = choice([at(YOURS, tmp_path / "yours"), at(SHIPPED, tmp_path / "shipped")])
    assert (mark_of(taken), getattr(taken, "down", None)) == (1 if down else 2, None)
    assert len(caplog.messages) == 1
    assert str(up_path.with_suffix("")) in caplog.text


@pytest.mark.parametrize("make", [a_folder, None, Path.touch], ids=["empty", "missing", "a-file"])
def test_a_place_without_tables_has_none(tmp_path: Path, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    if make is not None:
        make(tmp_path / "folder")
    with caplog.at_level(logging.DEBUG):
        assert isinstance(choice([at(YOURS, tmp_path / "folder")]), EngineEntry)
    assert not caplog.messages


numbers = st.integers() | st.sampled_from([0, 1, 16, 64, 10**400]) | st.floats()
leaves = st.none() | st.booleans() | numbers | st.text(max_size=5)
nonsense = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages", "USE_TMA")
almost_tables = st.dictionaries(
    st.sampled_from(["1", "64", "0", "-1", "x"]),
    nonsense | st.dictionaries(st.sampled_from(names), nonsense),
    max_size=3,
)
runs = st.fixed_dictionaries({item.name: leaves for item in dataclasses.fields(provenance.TuningRun)})
entries = st.fixed_dictionaries(
    {"origin": st.sampled_from(["measured", "predicted", ""]) | nonsense, "run": st.just(0) | nonsense}
    | {"figures": st.dictionaries(st.text(max_size=3), leaves, max_size=2) | nonsense}
)
almost_provenance = st.fixed_dictionaries(
    {"format": st.just(1), "runs": st.lists(runs, max_size=2), "entries": st.dictionaries(st.just("64"), entries)}
)


def encoded(document: object) -> bytes:
    return json.dumps(document).encode()


@given(st.binary(max_size=64) | nonsense.map(encoded) | almost_tables.map(encoded))
def test_a_table_full_of_nonsense_never_raises(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = {64: config()}
        write(Path(folder), table, known(table)).write_bytes(content)
        choice([at(YOURS, Path(folder)), at(ENGINES, Path(folder))])


@given(st.binary(max_size=64) | nonsense.map(encoded) | almost_provenance.map(encoded))
def test_provenance_full_of_nonsense_never_raises(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = {64: config()}
        provenance.sidecar(write(Path(folder), table, known(table))).write_bytes(content)
        choice([at(YOURS, Path(folder)), at(ENGINES, Path(folder))])


def test_a_table_whose_provenance_has_a_figure_that_no_float_holds_is_of_unknown_origin(tmp_path: Path) -> None:
    table = {64: config()}
    made = known(table)
    made.entries[64].figures["median_us"] = 1.0
    path = provenance.sidecar(write(tmp_path, table, made))
    path.write_text(path.read_text(encoding="utf-8").replace("1.0", "1" + "0" * 400), encoding="utf-8")
    chosen = choice([at(YOURS, tmp_path)])
    assert isinstance(chosen, OurEntry)
    assert chosen.origin == "origin unknown, its provenance cannot be read"
