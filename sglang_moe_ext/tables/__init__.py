"""Tables of configurations on disk: read with suspicion, written whole or not at all, with a note of their origin."""
