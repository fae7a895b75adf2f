#!/usr/bin/env bash
# Pack what `vllm serve` of vLLM 0.25.1 needs beside the pack of tools/pack_vllm.sh into OUT/server.tar.xz (about 15 MB, 1 minute).
# Unpack it over the other: tar -C FOLDER -xJf OUT/server.tar.xz. The machine has Python 3.12, torch 2.11 for CUDA 13, transformers.
# FlashAttention's operators are stood for by an empty module (80 MB, and attention is Triton's there); tools that vLLM imports only
# for images, sound, structured output of other kinds, or traces are left out. usage: tools/pack_vllm_server.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$1"; out=$(cd "$1" && pwd)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
platforms=$(printf -- '--platform manylinux_2_%s_x86_64 ' 39 35 34 31 28 27 24 17 12 5)
download() {
  # shellcheck disable=SC2086
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
    --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64 -d "$1" "${@:2}" \
    2>"$work/log" || { cat "$work/log" >&2; exit 1; }
}
for package in 'compressed-tensors==0.17.0' 'diskcache==5.6.3' 'lark==1.2.2' 'outlines_core==0.2.14' 'llguidance>=1.7,<1.8' \
  'fastapi>=0.133,<0.137' 'starlette>=1.0.1' 'apache-tvm-ffi==0.1.11' 'xgrammar==0.2.7' 'openai==3.57.0' dill httpcore2 httpx2 truststore \
  annotated-doc anyio attrs blake3 cachetools einops h11 httpcore httptools httpx ijson importlib_metadata jmespath jsonschema \
  jsonschema-specifications loguru model-hosting-container-standards msgpack opentelemetry-api orjson partial-json-parser \
  prometheus-fastapi-instrumentator prometheus_client psutil pybase64 python-json-logger python-multipart referencing rpds-py \
  sentencepiece setproctitle six sniffio supervisor tiktoken uvicorn uvloop watchfiles zipp; do
  download "$work/wheels" "$package"
done
for wheel in "$work"/wheels/*.whl; do unzip -q -o "$wheel" -d "$work/site"; done
mkdir -p "$work/site/vllm/vllm_flash_attn"
echo '"""Stands in for the compiled operators of FlashAttention, which nothing calls where attention is Triton'"'"'s."""' \
  >"$work/site/vllm/vllm_flash_attn/_vllm_fa2_C.py"
rm -rf "$work"/site/{bin,include,share}
find "$work/site" -name tests -type d -prune -exec rm -rf {} +
tar -C "$work/site" -cf - . | xz -T0 -6 >"$out/server.tar.xz"
ls -l "$out/server.tar.xz"
