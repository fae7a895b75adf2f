#!/usr/bin/env bash
# Pack a real Ray for a machine without a network into OUT/ray.tar.xz (about 25 MB, 2 minutes): what a cluster of one host needs to
# run actors on its GPUs. Left out: jars, the dashboard's pages, and the libraries built on it (data, serve, train, tune, rllib).
# The machine has what Ray requires but msgpack, which is packed with it, as is click. PYTHON_VERSION chooses 3.12 or another.
# Download the wheel beforehand into $RAY_WHEELS to save the time. usage: tools/pack_ray.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$1"; out=$(cd "$1" && pwd)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
version=${PYTHON_VERSION:-3.12}
download() {
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    -d "$1" "${@:2}" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
}
ray=${RAY_WHEELS:-$work/ray}
ls "$ray"/ray-2.60.0-*.whl >/dev/null 2>&1 || download "$ray" ray==2.60.0
download "$work/wheels" msgpack click protobuf
mkdir -p "$work/site"
for wheel in "$work"/wheels/*.whl; do unzip -q -o "$wheel" -d "$work/site"; done
unzip -q -o "$ray"/ray-2.60.0-*.whl -x 'ray/jars/*' 'ray/dashboard/client/*' 'ray/rllib/*' 'ray/serve/*' 'ray/data/*' 'ray/train/*' \
  'ray/tune/*' 'ray/air/*' 'ray/core/libjemalloc.so' -d "$work/site"
find "$work/site" \( -name '*.so' -o -name gcs_server -o -name raylet \) -exec strip --strip-unneeded {} + 2>/dev/null || true
rm -rf "$work/site/bin"
tar -C "$work/site" -cf - . | xz -T0 -9 >"$out/ray.tar.xz"
ls -l "$out/ray.tar.xz"
