"""Which tests are slow, and how many examples a property test tries: what the root conftest and the tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypothesis import settings

#: Examples per property test, by Hypothesis profile: `./dev test`, `./dev test --all`, `.ci/nightly`.
PROFILES = {"dev": 15, "ci": 50, "nightly": 100}

#: Fixtures that start a process or a server.
SLOW_FIXTURES: frozenset[str] = frozenset()

#: Folders and files all of whose tests start processes or servers, as prefixes of test ids.
SLOW_PATHS: tuple[str, ...] = ()


def examples(count: int, **options: Any) -> settings:
    """Return settings for ``count`` examples under the profile `nightly`, and for fewer under the quicker ones."""
    from hypothesis import settings

    profile = settings.get_current_profile_name()
    return settings(max_examples=count if profile == "nightly" else min(count, PROFILES[profile]), **options)
