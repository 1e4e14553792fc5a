"""``python -m jaxcompress``: the command line."""

import sys

from jaxcompress.cli import main

if __name__ == "__main__":
    sys.exit(main())
