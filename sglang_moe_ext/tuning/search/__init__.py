"""Which configurations are tried, and which one is taken: pure code that asks for measurements."""
