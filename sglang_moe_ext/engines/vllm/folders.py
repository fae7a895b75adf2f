"""Where vLLM looks for tables besides those that it ships."""

VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"
"""Names one flat folder, which comes first, for a server's MoE layers; it also moves MoE-LoRA to tables of its own."""
