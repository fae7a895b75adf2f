"""What we know about vLLM, 0.20 to 0.33."""
