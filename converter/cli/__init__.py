"""The program `twofold`: arguments to settings, one call, tables and an exit code.

Exit codes: 0 done, 1 a gate failed, 2 usage or a setting, 3 the model, 4 the calibration data,
5 internal, 130 interrupted. Each failure is one sentence on standard error.

Each command has a file of its name; what they share is in `options`, `groups` and `gating`.
"""

from __future__ import annotations

from converter.cli.program import app, main
from converter.cli.run import project_settings

__all__ = ["app", "main", "project_settings"]
