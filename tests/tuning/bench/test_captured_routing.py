"""Captured routing: what the dumps have is what the kernel gets, and what is no dump is refused by its name.

Dumps are written here as upstream's hook and as our capture write them; none was taken from a server.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from sglang_moe_ext.core import ModelError, MoEExtError, MoEShape
from sglang_moe_ext.tuning.bench import captured_routing, routing
from sglang_moe_ext.tuning.bench.routing import REMOTE, Routing

SHAPE = MoEShape(16, 64, 64, 2)
SHARED = MoEShape(17, 64, 64, 3, fused_shared=1)
SPLIT = MoEShape(5, 64, 64, 3, ep=2, fused_shared=1)
"""Two ranks of four routed experts; the shared one is 8 to the router and 4 on each rank."""


def rows(count: int, first: int = 0) -> torch.Tensor:
    """Ids [count, 2] of 16 experts by which each row of a table up to 200 rows can be told."""
    pairs = torch.combinations(torch.arange(16)).flip(1).contiguous()
    both = torch.cat((pairs, pairs.flip(1)))
    return both[first : first + count].to(torch.int32)


def dumped(folder: Path, *tables: torch.Tensor) -> Path:
    for layer, table in enumerate(tables):
        torch.save(table, folder / f"topk_ids_layer{layer + 3}_idx0.pt")
    return folder


def ids_of(folder: Path, shape: MoEShape, tokens: int, seed: int = 0) -> list[list[int]]:
    [made] = routing.routings(captured_routing.source(folder, shape), shape, tokens, 1, seed, "cpu")
    ids: list[list[int]] = made.topk_ids.tolist()
    return ids


def positions(found: list[list[int]]) -> list[int]:
    """The places of these rows in `rows`."""
    known = rows(200).tolist()
    return [known.index(row) for row in found]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_an_upstream_dump_comes_back_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    table = rows(20)
    assert ids_of(dumped(tmp_path, table.to(dtype)), SHAPE, 20) == table.tolist()


def test_bytes_reach_the_last_of_256_experts(tmp_path: Path) -> None:
    table = torch.tensor([[255, 0], [0, 255]], dtype=torch.uint8)
    assert ids_of(dumped(tmp_path, table), MoEShape(256, 64, 64, 2), 2) == table.tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_each_two_dimensional_integer_tensor_of_our_capture_is_a_table(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"layer.3": rows(6).to(dtype), "layer.4": rows(6, 6).to(dtype), "weights": torch.rand(6, 2)}
    save_file(tensors, tmp_path / "forward_0.safetensors")
    assert sorted(positions(ids_of(tmp_path, SHAPE, 12))) == list(range(12))


def test_both_formats_may_lie_in_one_folder_among_other_files(tmp_path: Path) -> None:
    save_file({"ids": rows(5, 5)}, dumped(tmp_path, rows(5)) / "forward_0.safetensors")
    (tmp_path / "README.md").write_text("captured yesterday")
    (tmp_path / "weights.pt").write_bytes(b"no dump, and no business of ours")
    assert sorted(positions(ids_of(tmp_path, SHAPE, 10))) == list(range(10))


@pytest.mark.parametrize("numbers", [(0, 0), (3, 1), (60, 12345)])
def test_layers_and_forwards_may_have_any_number(tmp_path: Path, numbers: tuple[int, int]) -> None:
    torch.save(rows(4), tmp_path / "topk_ids_layer{}_idx{}.pt".format(*numbers))
    assert ids_of(tmp_path, SHAPE, 4) == rows(4).tolist()


def test_fewer_tokens_than_a_table_has_are_a_contiguous_part_of_it(tmp_path: Path) -> None:
    found = positions(ids_of(dumped(tmp_path, rows(200)), SHAPE, 17))
    assert found == list(range(found[0], found[0] + 17))


def test_turns_begin_at_different_places(tmp_path: Path) -> None:
    source = captured_routing.source(dumped(tmp_path, rows(200)), SHAPE)
    turns = routing.routings(source, SHAPE, 5, 8, 0, "cpu")
    assert len({positions(turn.topk_ids.tolist())[0] for turn in turns}) > 4


def test_turns_take_different_tables(tmp_path: Path) -> None:
    source = captured_routing.source(dumped(tmp_path, *(rows(10, 10 * place) for place in range(8))), SHAPE)
    turns = routing.routings(source, SHAPE, 10, 8, 0, "cpu")
    assert len({positions(turn.topk_ids.tolist())[0] for turn in turns}) > 3


def test_the_same_seed_draws_the_same_rows_and_weights(tmp_path: Path) -> None:
    source = captured_routing.source(dumped(tmp_path, rows(50), rows(50, 50)), SHAPE)
    [one], [other] = (routing.routings(source, SHAPE, 9, 1, 5, "cpu") for _ in range(2))
    assert torch.equal(one.topk_ids, other.topk_ids) and torch.equal(one.topk_weights, other.topk_weights)


def test_tables_with_fewer_rows_than_tokens_are_joined(tmp_path: Path) -> None:
    found = positions(ids_of(dumped(tmp_path, rows(10), rows(10, 10), rows(10, 20)), SHAPE, 30))
    assert sorted(found) == list(range(30))


def test_rows_repeat_where_all_tables_have_too_few(tmp_path: Path) -> None:
    found = positions(ids_of(dumped(tmp_path, rows(3), rows(4, 3)), SHAPE, 14))
    assert sorted(found) == sorted([*range(7)] * 2)


def test_that_rows_repeat_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = captured_routing.source(dumped(tmp_path, rows(3, 100)), SHAPE)
    with caplog.at_level(logging.WARNING, captured_routing.__name__):
        routing.routings(source, SHAPE, 64, 4, 0, "cpu")
    assert [record.getMessage() for record in caplog.records] == [
        f"{source.name} has 3 rows: they repeat where a batch has more tokens; dump more for a truer one"
    ]


def test_the_weights_of_each_token_add_up_to_one(tmp_path: Path) -> None:
    [made] = routing.routings(captured_routing.source(dumped(tmp_path, rows(50)), SHAPE), SHAPE, 40, 1, 0, "cpu")
    assert torch.allclose(made.topk_weights.sum(dim=1), torch.ones(40))


def test_rows_of_padding_are_left_out(tmp_path: Path) -> None:
    padded = torch.cat((rows(4), torch.full((3, 2), REMOTE, dtype=torch.int32)))
    assert ids_of(dumped(tmp_path, padded), SHAPE, 4) == rows(4).tolist()


def test_the_shared_expert_is_added_last_where_the_dump_lacks_it(tmp_path: Path) -> None:
    assert ids_of(dumped(tmp_path, rows(4)), SHARED, 4) == [[*row, 16] for row in rows(4).tolist()]


def test_a_shared_expert_that_the_dump_has_stays_where_it_is(tmp_path: Path) -> None:
    table = torch.cat((rows(4), torch.full((4, 1), 16)), dim=1)
    assert ids_of(dumped(tmp_path, table), SHARED, 4) == table.tolist()


# Rank 0 has the routed experts 0-3, rank 1 has 4-7. Of the six routed ids, two are of rank 0 and four of rank 1.
GLOBAL = torch.tensor([[0, 4, 8], [7, 5, 8], [3, 6, 8]])
OF_RANK_0 = [[0, REMOTE, 4], [REMOTE, REMOTE, 4], [3, REMOTE, 4]]
OF_RANK_1 = [[REMOTE, 0, 4], [3, 1, 4], [REMOTE, 2, 4]]


@pytest.mark.parametrize(("rank", "expected"), [(0, OF_RANK_0), (1, OF_RANK_1)])
def test_ids_become_those_of_a_rank_as_worked_out_by_hand(rank: int, expected: list[list[int]]) -> None:
    assert captured_routing.for_rank(GLOBAL, SPLIT, rank).tolist() == expected


@pytest.mark.parametrize("with_shared", [True, False], ids=["with its shared expert", "without"])
def test_of_several_ranks_the_busiest_is_taken(tmp_path: Path, with_shared: bool) -> None:
    folder = dumped(tmp_path, GLOBAL if with_shared else GLOBAL[:, :2].contiguous())
    assert ids_of(folder, SPLIT, 3) == OF_RANK_1


def test_the_busiest_rank_is_that_of_the_batch_and_not_of_all_rows(tmp_path: Path) -> None:
    of_rank_0, of_rank_1 = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[4, 5], [6, 7]])
    source = captured_routing.source(dumped(tmp_path, of_rank_0, of_rank_1), SPLIT)
    turns = routing.routings(source, SPLIT, 2, 16, 0, "cpu")
    assert all((turn.topk_ids >= 0).all() for turn in turns)


def test_the_name_says_that_one_of_several_ranks_is_taken(tmp_path: Path) -> None:
    assert captured_routing.source(dumped(tmp_path, GLOBAL), SPLIT).name.endswith(" as the busiest of 2 ranks sees it")


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 200), st.integers(0, 2**40))
def test_whatever_the_tables_each_token_takes_what_some_dumped_row_has(
    lengths: list[int], tokens: int, seed: int
) -> None:
    stored = io.BytesIO()
    torch.save(rows(sum(lengths)), stored)
    made: Routing = captured_routing.CapturedRouting("any", tuple(lengths), stored.getvalue())(
        SHAPE, tokens, seed, "cpu"
    )
    assert len(made.topk_ids) == tokens
    assert max(positions(made.topk_ids.tolist())) < sum(lengths)


def test_a_source_goes_to_another_process_and_draws_the_same_there_without_the_folder(tmp_path: Path) -> None:
    source = captured_routing.source(dumped(tmp_path, rows(50)), SHAPE)
    (tmp_path / "topk_ids_layer3_idx0.pt").unlink()
    sent = pickle.loads(pickle.dumps(source))
    [here], [there] = (routing.routings(one, SHAPE, 9, 1, 0, "cpu") for one in (source, sent))
    assert torch.equal(here.topk_ids, there.topk_ids)


def test_the_name_is_the_same_wherever_the_folder_lies(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        dumped(folder, rows(9), rows(9, 9))
    assert captured_routing.source(here, SHAPE).name == captured_routing.source(there, SHAPE).name


@pytest.mark.parametrize("change", ["content", "file name", "one file more"])
def test_the_name_changes_with_what_is_in_the_folder(tmp_path: Path, change: str) -> None:
    before = captured_routing.source(dumped(tmp_path, rows(9)), SHAPE).name
    match change:
        case "content":
            dumped(tmp_path, rows(9, 1))
        case "file name":
            (tmp_path / "topk_ids_layer3_idx0.pt").rename(tmp_path / "topk_ids_layer3_idx1.pt")
        case "one file more":
            torch.save(rows(9), tmp_path / "topk_ids_layer3_idx1.pt")
    assert captured_routing.source(tmp_path, SHAPE).name != before


def test_no_more_files_are_kept_than_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_routing, "_ENOUGH_ROWS", 20)
    _, tables = captured_routing.read(dumped(tmp_path, *(rows(10, 10 * place) for place in range(8))), SHAPE)
    assert sum(map(len, tables)) == 20


BAD_TABLES: dict[str, tuple[torch.Tensor, MoEShape, str]] = {
    "one expert too many": (
        torch.tensor([[0, 16]]),
        SHAPE,
        r"experts \[0, 16\]; expected 2 different ones of 0 ... 15",
    ),
    "an expert twice": (torch.tensor([[1, 2], [5, 5]]), SHAPE, r"experts \[5, 5\]; expected 2 different"),
    "masked for one rank": (torch.tensor([[3, REMOTE]]), SHAPE, r"experts \[3, -1\]; .* of all ranks' experts"),
    "an id beyond int32": (torch.tensor([[0, 2**32 + 1]]), SHAPE, r"experts \[0, 4294967297\]"),
    "too narrow": (torch.tensor([[0]]), SHAPE, "has 1 experts a token: expected 2"),
    "too wide": (torch.tensor([[0, 1, 2]]), SHAPE, "has 3 experts a token: expected 2"),
    "of neither width": (torch.tensor([[0]]), SHARED, "has 1 experts a token: expected 2 or 3"),
    "no shared expert": (torch.tensor([[0, 1, 2]]), SHARED, r"\[0, 1, 2\]; expected 2 .* shared ones from 16 on"),
    "a shared expert where none is counted": (torch.tensor([[0, 16]]), SHARED, r"experts \[0, 16\]"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(("table", "shape", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_ids_that_the_layer_cannot_have_are_refused(
    tmp_path: Path, table: torch.Tensor, shape: MoEShape, message: str, suffix: str
) -> None:
    path = tmp_path / f"topk_ids_layer0_idx0{suffix}"
    if suffix == ".pt":
        torch.save(table, path)
    else:
        save_file({"ids": table}, path)
    with pytest.raises(ModelError, match=rf"^{re.escape(str(path))}.*{message}"):
        captured_routing.source(tmp_path, shape)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path: Path, write: Any) -> None:
    write(Malicious(tmp_path / "made"), tmp_path / "topk_ids_layer0_idx0.pt")
    with pytest.raises(MoEExtError, match=r"topk_ids_layer0_idx0\.pt is no tensor that torch\.save wrote"):
        captured_routing.source(tmp_path, SHAPE)
    assert not (tmp_path / "made").exists()


BAD_THINGS: dict[str, tuple[object, str]] = {
    "floats": (torch.rand(4, 2), r"torch.float32 \[4, 2\]: expected integers \[tokens, topk\]"),
    "booleans": (torch.ones(4, 2, dtype=torch.bool), r"torch.bool \[4, 2\]"),
    "one dimension": (torch.arange(4), r"torch.int64 \[4\]"),
    "three dimensions": (torch.zeros(2, 2, 2, dtype=torch.int32), r"torch.int32 \[2, 2, 2\]"),
    "a dict": ({"topk_ids": torch.zeros(4, 2)}, "has a dict: expected one tensor"),
    "a list": ([[0, 1]], "has a list: expected one tensor"),
    "a sparse tensor": (torch.eye(2).to_sparse(), "has a Tensor: expected one tensor"),
    "a nested tensor": (torch.nested.nested_tensor([torch.arange(2), torch.arange(3)]), "has a Tensor"),
    "a tensor without content": (torch.empty(4, 2, device="meta"), "has a Tensor: expected one tensor"),
    "a view larger than its file": (torch.zeros(1, 2, dtype=torch.int32).expand(2**40, 2), "has a Tensor"),
}


@pytest.mark.parametrize(("thing", "message"), BAD_THINGS.values(), ids=BAD_THINGS)
def test_what_is_no_table_of_integers_is_refused(tmp_path: Path, thing: object, message: str) -> None:
    path = tmp_path / "topk_ids_layer0_idx0.pt"
    torch.save(thing, path)
    with pytest.raises(MoEExtError, match=rf"^{re.escape(str(path))} has .*{message.removeprefix('has ')}"):
        captured_routing.source(tmp_path, SHAPE)


def test_a_safetensors_file_without_integers_is_refused(tmp_path: Path) -> None:
    save_file({"weights": torch.rand(4, 2)}, tmp_path / "forward_0.safetensors")
    with pytest.raises(MoEExtError, match=r"forward_0\.safetensors has no integers \[tokens, topk\]"):
        captured_routing.source(tmp_path, SHAPE)


def test_a_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "forward_0.safetensors").write_bytes(save({"ids": rows(9)})[:-1])
    with pytest.raises(MoEExtError, match=r"forward_0\.safetensors is damaged"):
        captured_routing.source(tmp_path, SHAPE)


def of_torch_save(tensor: torch.Tensor) -> bytes:
    stored = io.BytesIO()
    torch.save(tensor, stored)
    return stored.getvalue()


SOUND = {"topk_ids_layer0_idx0.pt": of_torch_save(rows(9)), "forward_0.safetensors": save({"ids": rows(9)})}


@pytest.mark.parametrize("name", SOUND)
@given(data=st.data())
def test_damage_never_raises_anything_else_than_our_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    content = bytearray(SOUND[name][: data.draw(st.integers(0, len(SOUND[name])))])
    for place in data.draw(st.lists(st.integers(0, max(len(content) - 1, 0)), max_size=4)):
        content[place : place + 1] = data.draw(st.binary(max_size=3))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / name).write_bytes(content)
    with contextlib.suppress(MoEExtError):
        captured_routing.source(folder, SHAPE)


def test_a_dump_that_ends_within_a_number_is_refused_by_name(tmp_path: Path) -> None:
    """torch's own unpickler raises struct.error then."""
    (tmp_path / "topk_ids_layer0_idx0.pt").write_bytes(b"G")
    with pytest.raises(MoEExtError, match=r"topk_ids_layer0_idx0\.pt is no tensor that torch\.save wrote"):
        captured_routing.source(tmp_path, SHAPE)


def test_a_file_too_large_for_ids_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "forward_0.safetensors").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(MoEExtError, match=r"forward_0\.safetensors is larger than 1 GiB"):
        captured_routing.source(tmp_path, SHAPE)


@pytest.mark.parametrize("name", [None, "other.pt", "topk_ids_layer0.pt"], ids=["empty", "other", "almost"])
def test_a_folder_without_a_dump_is_refused_with_what_a_dump_is_called(tmp_path: Path, name: str | None) -> None:
    if name is not None:
        torch.save(rows(9), tmp_path / name)
    with pytest.raises(MoEExtError, match=r"expected files topk_ids_layer<L>_idx<I>\.pt or \*\.safetensors$"):
        captured_routing.source(tmp_path, SHAPE)


@pytest.mark.parametrize("place", ["missing", "file"])
def test_what_is_no_folder_is_refused_by_its_name(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoEExtError, match=rf"^cannot read {re.escape(str(tmp_path / place))}: .* takes a folder$"):
        captured_routing.source(tmp_path / place, SHAPE)


@pytest.mark.parametrize("table", [rows(0), torch.full((3, 2), REMOTE)], ids=["no rows", "padding alone"])
def test_dumps_without_a_token_are_refused(tmp_path: Path, table: torch.Tensor) -> None:
    with pytest.raises(MoEExtError, match="have no tokens"):
        captured_routing.source(dumped(tmp_path, table), SHAPE)
