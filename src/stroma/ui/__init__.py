"""The web interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stroma._utils.distributions import missing

if TYPE_CHECKING:
    from stroma.ui.app import make_app, serve
    from stroma.ui.settings import Settings

__all__ = ["Settings", "make_app", "serve"]


def __getattr__(name: str) -> Any:
    try:
        if name in __all__:
            from stroma.ui import app

            return getattr(app, name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in (
            "jinja2",
            "starlette",
            "uvicorn",
            "anyio",
            "markupsafe",
        ):
            raise
        raise missing(str(error.name), "stroma.ui", "ui") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
