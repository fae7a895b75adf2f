# Source this on a GPU machine: `. tools/unpack_engine.sh DIR` unpacks the engine that pack_engine.sh or pack_vllm.sh made into DIR, once,
# and puts it and this checkout first on PYTHONPATH.
engine=/var/tmp/sglang-moe-ext-engine$(basename "$1")
if [ ! -e "$engine/.complete" ]; then
  mkdir -p "$engine" && tar -C "$engine" -xJf "$1/site.tar.xz" && touch "$engine/.complete"
fi
export PYTHONPATH="$PWD:$engine${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 FLASHINFER_USE_CUDA_NORM=1
