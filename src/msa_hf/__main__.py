"""`python -m msa_hf`: the command line `msa-hf`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
