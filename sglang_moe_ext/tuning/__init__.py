"""The tuning wing: from a layer's shape to a table of configurations that fit, are right, and are fast."""
