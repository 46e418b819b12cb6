"""The commands of `msa-hf`, a file each: `add_to` adds its options to the command line, `run` does its work."""
