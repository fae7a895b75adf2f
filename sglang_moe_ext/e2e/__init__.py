"""A server end to end, stock against plugin: start it, send it requests, compare."""
