"""Entry point of `python -m converter`, which is `twofold`."""

from __future__ import annotations

from converter.cli import main

if __name__ == "__main__":
    main()
