#!/usr/bin/env bash
# Make .venv (torch, Triton, transformers, the tools of ./check) and .engines (the real SGLang, eight releases, and the real vLLM,
# three, unpacked). Does nothing where both are there and their requirements have not changed. 2 to 3 minutes and 3 GB the first time.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
versions="0.5.5 0.5.8 0.5.10 0.5.12 0.5.15 0.5.18 0.5.20 0.5.23"
vllm_versions="0.20.2 0.25.1 0.33.0"
stamp=$(cat requirements/*.txt tools/environment.sh tools/patch_torchvision.py tools/unpack_vllm.py | sha256sum | cut -d' ' -f1)
[ "$(cat .venv/.stamp 2>/dev/null)" = "$stamp" ] && [ -d .engines/sglang/0.5.23 ] && [ -d .engines/vllm/0.33.0 ] && exit 0

say() { echo "[environment] $*" >&2; }
quietly() { # keep pip's warnings to ourselves unless it fails
  local log; log=$(mktemp)
  "$@" >"$log" 2>&1 || { tail -20 "$log" >&2; return 1; }
  rm -f "$log"
}
unpack_engines() {
  # No bytecode: an engine is imported in parts, and its first child keeps what that part needs.
  for version in $versions; do
    say "unpacking SGLang $version"
    quietly .venv/bin/pip install --no-deps --no-compile --target ".engines/sglang/$version" "sglang==$version"
  done
  for version in $vllm_versions; do
    say "unpacking vLLM $version"
    wheel=$(mktemp -d)
    quietly .venv/bin/pip download --no-deps --platform manylinux_2_28_x86_64 --platform manylinux_2_35_x86_64 -d "$wheel" "vllm==$version"
    .venv/bin/python tools/unpack_vllm.py "$wheel"/vllm-*.whl ".engines/vllm/$version"
    rm -rf "$wheel"
  done
  say "unpacking the newest transformers"
  quietly .venv/bin/pip install --no-deps --no-compile --target .engines/transformers-newest -r requirements/newest-transformers.txt
}
say "making .venv with $("$python" --version): torch, Triton, transformers; and unpacking the engines meanwhile"
rm -rf .venv .engines
"$python" -m venv .venv
unpack_engines &
engines=$!
trap 'kill $engines 2>/dev/null || true' EXIT
quietly .venv/bin/pip install -r requirements/engine.txt -r requirements/dev.txt
quietly .venv/bin/pip install --no-deps -r requirements/engine-nodeps.txt -r requirements/vllm.txt
.venv/bin/python tools/patch_torchvision.py
wait $engines
echo "$stamp" >.venv/.stamp
say "done"
