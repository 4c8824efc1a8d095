"""Libraries that a sink needs and foreshock does not."""

from __future__ import annotations

import importlib
from typing import Any

from foreshock.errors import ConfigError


def needed(module: str, by: str, extra: str) -> Any:
    """``module``, imported. Raises ConfigError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"making a {by}: {error}; pip install 'foreshock[{extra}]'") from error
