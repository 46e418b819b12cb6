"""A bank in tiers of device, host and disk, and the plan that puts it there (docs/scaling.md)."""
