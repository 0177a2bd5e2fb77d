"""`python -m stroma`: the command line, where the command `stroma` is not on the PATH."""

import os
import sys

if __name__ == "__main__":
    # `-m` looks for modules in the current directory first; the command `stroma` does not.
    if not sys.flags.safe_path:
        del sys.path[0]
    from stroma.cli import main

    sys.exit(main(program=os.environ.get("STROMA_PROGRAM") or "python -m stroma"))
