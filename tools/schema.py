"""Write the JSON Schema of twofold.toml, which editors complete and check the file by.

    python -m tools.schema

It goes to `docs/twofold.schema.json`; `twofold init` writes the same beside the file.
"""

from __future__ import annotations

from pathlib import Path

from converter.cli import project_settings
from converter.project import SCHEMA_FILE, schema
from converter.report.files import write_report

__all__ = ["PUBLISHED", "main"]

PUBLISHED = Path(__file__).resolve().parent.parent / "docs" / SCHEMA_FILE


def main() -> None:
    """Write it."""
    write_report(PUBLISHED, schema(project_settings()))
    print(f"{PUBLISHED} is written")


if __name__ == "__main__":
    main()
