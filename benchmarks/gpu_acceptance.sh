#!/usr/bin/env bash
# On a GPU machine with SGLang: prefill of a dummy GLM-4.7-Flash (8 layers, 4096 tokens) as shipped, then tune the model,
# then the same prefill again; prints the engine's log lines about tables and the latencies.
# usage: benchmarks/gpu_acceptance.sh OUT [M ...]      (batch sizes to tune, default 1 64 1024 4096)
set -euo pipefail
out=$1; shift; [ $# -gt 0 ] || set -- 1 64 1024 4096
model=/var/tmp/glm_4_7_flash
python3 -W ignore benchmarks/dummy_model.py "$model" glm_4_7_flash 8
prefill() {
  python3 -W ignore -m sglang.bench_one_batch --model-path "$model" --load-format dummy --attention-backend triton \
    --sampling-backend pytorch --grammar-backend none --batch-size 1 --input-len 4096 --output-len 6 \
    --mem-fraction-static 0.6 --disable-cuda-graph >"$out/$1.log" 2>&1 || { tail -5 "$out/$1.log"; return 1; }
  echo "== $1"
  grep -ho "Using .*MoE kernel config.*json" "$out/$1.log" | sort -u
  grep -h "Prefill. latency" "$out/$1.log"
}
prefill stock_first
prefill stock
python3 -W ignore -m sglang_moe_ext.tune --model GLM-4.7-Flash --tp-size 1 --batch-size "$@" 2>&1 | tee "$out/tune.log"
prefill tuned_first
prefill tuned
