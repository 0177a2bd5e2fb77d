"""Examples that need more than the main environment has: ``./dev test --examples`` runs them in their own."""

import os

#: Without that environment nothing is collected, and nothing is skipped in silence.
collect_ignore = [] if os.environ.get("STROMA_TEST_EXAMPLES") else ["test_heavy.py"]
