#!/usr/bin/env bash
# Pack a real SGLang 0.5.15 for a GPU machine without a network into OUT/site.tar.xz (about 55 MB, 2 minutes).
# The machine has Python 3.12, torch 2.11 for CUDA 13, Triton 3.6, numpy, aiohttp and the like; 0.5.15 was made for that torch.
# Of the compiled operators only what the MoE path of a Hopper GPU needs is kept. usage: tools/pack_engine.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$1"; out=$(cd "$1" && pwd)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
platforms=$(printf -- '--platform manylinux_2_%s_x86_64 ' 39 35 34 31 28 27 24 17)
download() {
  # shellcheck disable=SC2086
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$work/wheels" "$@" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
}
download sglang==0.5.15 transformers==5.12.1 tokenizers==0.22.2 apache-tvm-ffi==0.1.11 flashinfer_python==0.6.12 \
  openai==2.6.1 kernels==0.14.1 outlines==0.1.11 outlines-core==0.1.26 sglang-kernel==0.4.4
for package in airportsdata annotated-types asttokens blobfile cffi compressed-tensors cuda-python cuda-tile datasets decorator dill \
  diskcache distro docstring-parser easydict executing fastapi gguf interegular ipython ipython-pygments-lexers jedi jiter \
  jsonschema jsonschema-specifications lark loguru matplotlib-inline msgspec multiprocess nest-asyncio openai-harmony \
  opentelemetry-api opentelemetry-sdk opentelemetry-semantic-conventions orjson parso partial-json-parser pexpect \
  prompt-toolkit ptyprocess pure-eval pybase64 pycparser pycryptodomex pydantic pydantic-core python-multipart pyzmq \
  referencing rpds-py setproctitle smg-grpc-servicer sniffio soundfile stack-data starlette torch_memory_saver traitlets \
  typing-inspection uvicorn watchfiles wcwidth zstandard; do
  download "$package"
done
operators=$(ls "$work"/wheels/sglang_kernel-*.whl)
mkdir -p "$work/site/cutlass"
for wheel in "$work"/wheels/*.whl; do
  [ "$wheel" = "$operators" ] || unzip -q -o "$wheel" -d "$work/site"
done
unzip -q -o "$operators" -x sgl_kernel/flash_ops.abi3.so 'sgl_kernel/sm100/*' sgl_kernel/flashmla_ops.abi3.so -d "$work/site"
cp tools/cutlass_stand_in.py "$work/site/cutlass/__init__.py"
rm -rf "$work/site/sglang/multimodal_gen" "$work/site/jedi/third_party/typeshed/stubs"
find "$work/site" -name tests -type d -prune -exec rm -rf {} +
tar -C "$work/site" -cf - . | xz -T0 -6 >"$out/site.tar.xz"
ls -l "$out/site.tar.xz"
