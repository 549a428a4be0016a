"""Entry point of `python -m models`."""

from __future__ import annotations

from models.cli import app

if __name__ == "__main__":
    app(prog_name="python -m models")
