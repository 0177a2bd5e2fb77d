"""Conformance tests of journal stores by subject, those of cells, and a state machine of a store."""

import pytest

pytest.register_assert_rewrite(
    *(
        f"{__name__}.{one}"
        for one in (
            "cells",
            "executions",
            "helpers",
            "machine",
            "machine_checks",
            "messages",
            "ownership",
            "reading",
            "signals",
        )
    )
)
