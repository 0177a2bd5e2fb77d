"""`python -m stroma`: the command line, where the command `stroma` is not on the PATH."""

import sys

from stroma.cli import main

if __name__ == "__main__":
    sys.exit(main(program="python -m stroma"))
