#!/usr/bin/env bash
# Pack a real vLLM 0.25.1 for a Hopper GPU machine without a network into OUT/site.tar.xz (about 25 MB, 2 minutes): its
# Python, and of its libraries the two that `fused_experts` needs, with the machine code for sm_90 alone.
# The machine has Python 3.12, torch 2.11 for CUDA 13, Triton 3.6, transformers; 0.25.1 was made for that torch.
# Download the wheel beforehand into $VLLM_WHEELS to save the time. usage: tools/pack_vllm.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$1"; out=$(cd "$1" && pwd)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
platforms=$(printf -- '--platform manylinux_2_%s_x86_64 ' 39 35 34 31 28 27 24 17)
download() {
  # shellcheck disable=SC2086
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$1" "${@:2}" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
}
vllm=${VLLM_WHEELS:-$work/vllm}
ls "$vllm"/vllm-0.25.1-*.whl >/dev/null 2>&1 || download "$vllm" vllm==0.25.1
# Pydantic names the one pydantic-core that it works with; the others take what is newest.
download "$work/wheels" pydantic==2.12.5 pydantic-core==2.41.5 openai==2.6.1
for package in annotated-types cbor2 cffi cloudpickle distro jiter msgspec openai-harmony py-cpuinfo pycparser pyzmq sniffio \
  soundfile typing-inspection; do
  download "$work/wheels" "$package"
done
mkdir -p "$work/site"
for wheel in "$work"/wheels/*.whl; do unzip -q -o "$wheel" -d "$work/site"; done
unzip -q -o "$vllm"/vllm-0.25.1-*.whl '*.py' '*.json' 'vllm-*.dist-info/*' 'vllm/_C_stable_libtorch.abi3.so' \
  'vllm/_moe_C_stable_libtorch.abi3.so' -d "$work/site"
for library in _C_stable_libtorch _moe_C_stable_libtorch; do
  python3 tools/keep_architecture.py "$work/site/vllm/$library.abi3.so" 90
done
rm -rf "$work"/site/{bin,include,share}
find "$work/site" -name tests -type d -prune -exec rm -rf {} +
tar -C "$work/site" -cf - . | xz -T0 -6 >"$out/site.tar.xz"
ls -l "$out/site.tar.xz"
