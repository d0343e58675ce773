"""`python -m unipic_jax` is the `unipic` command."""

import sys

from unipic_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
