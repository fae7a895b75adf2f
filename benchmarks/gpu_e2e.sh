#!/usr/bin/env bash
# On a GPU machine with SGLang: whether tuning a whole dummy model is worth it, then the server with and without the plugin.
# Prints the estimate, and last the tables of `sglang-moe-ext e2e`, which OUT keeps with the servers' logs.
# usage: benchmarks/gpu_e2e.sh OUT [glm_4_7_flash|qwen3_30b_a3b|qwen3_30b_a3b_fp8] [LAYERS] [FLAGS OF e2e ...]
set -euo pipefail
out=$1 model=${2:-qwen3_30b_a3b_fp8} layers=${3:-48}
shift $(($# < 3 ? $# : 3))
work=/var/tmp/gpu_e2e_$model
mkdir -p "$work" "$out"
python3 -W ignore benchmarks/dummy_model.py "$work/model" "$model" "$layers"
python3 - "$work/site" <<'PYTHON'
import sys
from pathlib import Path

from benchmarks.serving import plugin_site

plugin_site.write(Path(sys.argv[1]), spread_weights=True)
PYTHON
export PYTHONPATH="$work/site:$PYTHONPATH"
timeout -s KILL 120 python3 -W ignore -m sglang_moe_ext plan --worth-it --model "$work/model" 2>&1 | tee "$out/worth.txt"
read -ra flags < <(python3 -c 'from benchmarks.serving.http_server import FLAGS; print(*FLAGS)')
timeout -s INT -k 20 "${E2E_SECONDS:-450}" python3 -W ignore -m sglang_moe_ext e2e --engine sglang --output-dir "$out" --vocabulary 150000 \
  --runs 2 --batch-size 1 4 16 64 256 --start-timeout 240 "$@" -- \
  --model-path "$work/model" "${flags[@]}" --cuda-graph-max-bs-decode 256
