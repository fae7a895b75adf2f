"""The process that measures, and what it is asked."""
