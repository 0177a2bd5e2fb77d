"""Which tests are slow, and how many examples a property test tries, for the root conftest and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.shared_stores import DURABLE, ON_SERVERS

if TYPE_CHECKING:
    from hypothesis import settings

#: Examples per property test, by Hypothesis profile: `./dev test`, `./dev test --all`, `.ci/nightly`.
PROFILES = {"dev": 15, "ci": 25, "nightly": 100}

#: Fixtures that start a process or a server of their own.
SLOW_FIXTURES = frozenset(
    {
        "browser",
        "chromium",
        "datadog_agent",
        "otlp",
        "postgres",
        "prometheus",
        "redis",
        "sentry_server",
        "session",
        "statsd",
        "temporal_server",
    }
)

#: Parameters that stand for a store on a server.
SERVERS = frozenset(DURABLE) - {"sqlite"}

#: Parameters that stand for a server or for other processes.
SLOW_PARAMETERS = frozenset({*SERVERS, "temporal", *(f"workers-{kind}" for kind in ON_SERVERS), "killed"})

#: Tests of what each server does by itself, and of kills that could lose or repeat work. Elsewhere the
#: parameter for PostgreSQL is nightly: SQLite and Redis show the same.
EACH_SERVER_PATHS = (
    "tests/chaos/",
    "tests/checkpoint/",
    "tests/effects/test_every_record.py",
    "tests/limits/",
    "tests/runner/test_map_kill.py",
)

#: Folders and files all of whose tests are slow, as prefixes of test ids.
SLOW_PATHS = (
    "tests/chaos/",
    "tests/checkpoint/test_postgres.py",
    "tests/checkpoint/test_redis",
    "tests/checkpoint/test_scale.py",
    "tests/cli/test_temporal.py",
    "tests/cli/test_servers.py",
    "tests/cli/test_signals.py",
    "tests/demo/test_provider.py",
    "tests/demo/test_show.py",
    "tests/examples/",
    "tests/frameworks/",
    "tests/docs/test_generated_pages.py",
    "tests/docs/test_pages.py",
    "tests/runner/test_map_kill.py",
    "tests/project/test_package.py",
    "tests/docs/test_temporal_page.py",
    "tests/docs/test_tutorial.py",
    "tests/project/test_typing.py",
    "tests/ui/test_browser.py",
    "tests/ui/test_standards.py",
    "tests/wire/test_clients.py",
)

#: Files whose tests fork this process. They come first: a fork copies all that earlier tests have left in it.
FORKING_PATHS = ("tests/testing/test_resumable.py",)

#: Single tests of 20 to 60 s. They come next: at the end one worker would be busy with them, and the others
#: idle.
LONG_PATHS = (
    "tests/docs/test_types.py",
    "tests/docs/test_tutorial.py",
    "tests/telemetry/test_consistency.py",
    "tests/demo/test_show.py",
)

#: Files all of whose tests run on every Python: the published surface.
CORE_PATHS = ("tests/project/test_published_surface.py",)


def examples(count: int, **options: Any) -> settings:
    """Return settings for ``count`` examples under the profile `nightly`, and fewer under quicker ones."""
    from hypothesis import settings

    profile = settings.get_current_profile_name()
    return settings(max_examples=count if profile == "nightly" else min(count, PROFILES[profile]), **options)
