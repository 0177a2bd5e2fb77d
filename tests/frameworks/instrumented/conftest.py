"""CrewAI reports to its makers unless its settings forbid that, and stores things in the user's folders."""

import os
import tempfile

os.environ.update(
    CREWAI_DISABLE_TELEMETRY="true",
    CREWAI_TRACING_ENABLED="false",
    CREWAI_TESTING="true",
    CREWAI_STORAGE_DIR=tempfile.mkdtemp(prefix="stroma-crewai-"),
)
