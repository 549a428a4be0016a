"""How a setting that makes no sense is refused."""

from __future__ import annotations

from converter.errors import ConfigError

__all__ = ["require"]


def require(condition: bool, message: str) -> None:
    """Refuse with `ConfigError` what does not hold."""
    if not condition:
        raise ConfigError(message)
