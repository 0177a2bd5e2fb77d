"""Conformance tests of journal stores by subject, those of cells, and a state machine of a store."""

import pytest

pytest.register_assert_rewrite(__name__)
