"""A server for a model and its bank, with OpenAI's API (docs/serving.md); `msa-hf serve` runs it."""
