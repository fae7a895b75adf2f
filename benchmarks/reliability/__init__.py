"""Random damage to all that this package reads from strangers, in large numbers."""
