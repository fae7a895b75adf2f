#!/usr/bin/env bash
# Pack what `bench` compares beside SGLang, for a GPU machine without a network, into OUT/site.tar.xz: DeepGEMM, quack with CuTe DSL,
# and vLLM's copy of triton_kernels. There, `. tools/unpack_engine.sh OUT` after that of the engine. usage: tools/pack_backends.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$1"; out=$(cd "$1" && pwd)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
platforms=$(printf -- '--platform manylinux_2_%s_x86_64 ' 39 35 34 31 28 27 24 17)
# shellcheck disable=SC2086
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
  --platform manylinux2014_x86_64 -d "$work/wheels" sgl-deep-gemm==0.1.4 quack-kernels==0.4.1 nvidia-cutlass-dsl==4.5.2 \
  nvidia-cutlass-dsl-libs-base==4.5.2 nvidia-cutlass-dsl-libs-cu13==4.5.2 torch-c-dlpack-ext 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
mkdir -p "$work/site"
for wheel in "$work"/wheels/*.whl; do unzip -q -o "$wheel" -d "$work/site"; done
cp -r .engines/vllm/0.25.1/vllm/third_party/triton_kernels "$work/site/triton_kernels"
find "$work/site" -name __pycache__ -prune -exec rm -rf {} +
tar -C "$work/site" -cf - . | xz -T0 -6 >"$out/site.tar.xz"
ls -l "$out/site.tar.xz"
