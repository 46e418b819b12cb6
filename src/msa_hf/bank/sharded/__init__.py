"""A bank that several processes share (docs/parallel.md)."""
