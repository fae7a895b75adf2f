"""File names: what we write for a key is read back as that key, in both dialects, and nothing else is read at all."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import MoEShape, Quantization, Scheme, TableError, TableKey
from sglang_moe_ext.engines import table_names
from sglang_moe_ext.engines.sglang import table_names as sglang
from sglang_moe_ext.engines.vllm import table_names as vllm

# What the device names of all vendors are made of; the suffix of a table for the down projection is no device's.
devices = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,24}", fullmatch=True).filter(
    lambda name: not name.endswith("_down")
)
sizes = st.integers(1, 10**6)
blocks = st.none() | st.tuples(sizes, sizes)
schemes = st.sampled_from([None, *get_args(Scheme)])

sglang_keys = st.builds(TableKey, sizes, sizes, devices, schemes, blocks, st.booleans(), st.booleans())
vllm_keys = st.builds(TableKey, sizes, sizes, devices, schemes, blocks)


@given(sglang_keys)
def test_a_name_in_sglangs_dialect_is_read_as_its_key(key: TableKey) -> None:
    assert table_names.parse(sglang.file_name(key)) == key


@given(vllm_keys)
def test_a_name_in_vllms_dialect_is_read_as_its_key(key: TableKey) -> None:
    assert table_names.parse(vllm.file_name(key)) == key


@given(st.text(max_size=40) | sglang_keys.map(sglang.file_name).flatmap(
    lambda name: st.integers(0, len(name)).map(lambda at: name[:at])))  # fmt: skip
def test_any_text_is_a_name_or_refused_by_name(text: str) -> None:
    try:
        table_names.parse(text)
    except TableError as error:
        assert repr(text) in str(error)


@given(sglang_keys)
def test_the_dialects_differ_in_the_block_shape_alone(key: TableKey) -> None:
    plain = TableKey(key.experts, key.intermediate_size, key.device_name, key.scheme)
    assert sglang.file_name(plain) == vllm.file_name(plain)


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        (Quantization(), "E=128,N=768,device_name=NVIDIA_H200.json"),
        (
            Quantization("fp8_w8a8", (128, 128)),
            "E=128,N=768,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json",
        ),
        (Quantization("fp8_w8a8", per_channel=True), "E=128,N=768,device_name=NVIDIA_H200,dtype=fp8_w8a8.json"),
        (Quantization("int8_w8a8", per_channel=True), "E=128,N=768,device_name=NVIDIA_H200.json"),
        (Quantization("int4_w4a16", (0, 128)), "E=128,N=768,device_name=NVIDIA_H200,dtype=int4_w4a16.json"),
    ],
    ids=["bf16", "fp8 block", "fp8 channel", "int8", "int4"],
)
def test_vllm_asks_for_the_table_by_this_name(quantization: Quantization, name: str) -> None:
    assert vllm.file_name(vllm.table_key(MoEShape(128, 768, 2048, 8, quantization), "NVIDIA H200")) == name


@pytest.mark.parametrize(
    ("device", "written"),
    [
        ("NVIDIA H200", "NVIDIA_H200"),
        ("NVIDIA H200 NVL", "NVIDIA_H200"),
        ("NVIDIA H20-3e", "NVIDIA_H20-3e"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA_A100-SXM4-80GB"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA_GeForce_RTX_4090"),
    ],
)
def test_vllm_writes_the_gpu_so(device: str, written: str) -> None:
    assert vllm.device_in_names(device) == written


@pytest.mark.parametrize(
    "name",
    [
        "E=128,N=768.json",
        "E=128,N=768,device_name=.json",
        "E=-1,N=768,device_name=NVIDIA_H200.json",
        "E=0x80,N=768,device_name=NVIDIA_H200.json",
        "E=٣,N=768,device_name=NVIDIA_H200.json",
        "E=0128,N=768,device_name=NVIDIA_H200.json",
        "E=128,N=768,device_name=NVIDIA_H200,dtype=fp4.json",
        "E=128,N=768,device_name=NVIDIA_H200,dtype=.json",
        "E=128,N=768,device_name=NVIDIA_H200,block_shape=[128].json",
        "E=128,N=768,device_name=NVIDIA_H200,per_channel_quant=False.json",
        "E=128,N=768,device_name=../../etc/passwd.json",
        "E=128,N=768,device_name=NVIDIA_H200.json\n",
        "E=128,N=768,device_name=NVIDIA_H200.provenance.json.bak",
    ],
    ids=[
        "no device",
        "empty device",
        "negative",
        "hexadecimal",
        "arabic",
        "leading zero",
        "unknown scheme",
        "empty scheme",
        "one block edge",
        "per channel false",
        "another folder",
        "newline",
        "backup",
    ],
)
def test_a_name_that_no_engine_asks_for_is_refused(name: str) -> None:
    with pytest.raises(TableError, match="file name"):
        table_names.parse(name)
