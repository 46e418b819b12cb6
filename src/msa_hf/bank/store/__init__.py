"""A bank that changes: documents are added, replaced and deleted, one commit after the other (docs/bank_format.md)."""
