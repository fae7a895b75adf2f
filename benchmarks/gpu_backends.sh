#!/usr/bin/env bash
# On a GPU machine with SGLang: the backends of five layers side by side. OUT gets the figures; the tables come last.
# Each layer has a time limit; a backend that hangs costs its own five minutes at most.
# usage: benchmarks/gpu_backends.sh OUT [FLAGS OF bench ...]
set -uo pipefail
out=$1
shift
mkdir -p "$out"
compare() { # NAME FLAGS ...
  local name=$1
  shift
  timeout -k 5 "${LAYER_SECONDS:-240}" python3 -W ignore -m sglang_moe_ext bench --effort quick --output-dir "$out/$name" "$@" \
    >"$out/$name.txt" 2>&1 || echo "$name: ended with $?"
}
for layer in "glm_bf16 --model GLM-4.7-Flash" "qwen3_bf16 --model Qwen3-30B-A3B" "qwen3_fp8 --model Qwen3-30B-A3B-FP8" \
  "deepseek_fp8 --model DeepSeek-V3 --tp-size 8" "qwen3_channel --shape E=128,N=768,K=2048,topk=8,dtype=fp8_w8a8,per_channel_quant=True"; do
  # shellcheck disable=SC2086
  compare $layer --batch-size 1024 4096 16384 "$@"
done
compare qwen3_matmul_ogs --model Qwen3-30B-A3B --backends tuned triton_kernels --batch-size 16 32 64 128 256 512 1024 2048 4096 8192
for table in "$out"/*/bench.md; do
  echo
  cat "$table"
done
