"""Searching a bank by its routers, by words, by an embedding model, and by all of them (docs/retrieval.md)."""
