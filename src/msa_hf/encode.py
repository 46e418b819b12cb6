"""`accelerate launch -m msa_hf.encode MODEL SOURCE BANK`: the command `msa-hf encode`, for launchers of processes."""

import sys

from .cli.command_line import main

if __name__ == "__main__":
    sys.exit(main(["encode", *sys.argv[1:]]))
