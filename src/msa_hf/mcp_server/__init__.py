"""A bank as tools for assistants: a server of the Model Context Protocol, `msa-hf mcp` (docs/mcp.md)."""
