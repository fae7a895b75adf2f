"""Candidates compiled in parallel processes, each once."""
