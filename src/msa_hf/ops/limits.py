"""What backends do not take: `<backend>_<operation>(*, device, ...) -> reason or None`.

A reason completes the sentence "route_documents cannot run on the backend 'cuda': ...". Where a backend has no function
here it takes everything. Features of the operations:

- route_documents: queries, keys (dtypes), multiple (the largest power of two up to 64 that divides E), width (the least
  power of two from E), k (likewise).
- pool_chunks, pool_chunks_backward: states (dtype), multiple (of D), width (of G * D), routing_dtype (dtype or None).
- gather_documents: content, dtype (dtypes), multiple (of D), source ("device", "pinned" or "host").

`width` and `k` are rounded up to powers of two because torch.compile may not know the number.
"""
