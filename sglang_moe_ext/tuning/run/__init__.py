"""One measuring run: its GPUs, its folder, its journal."""
