"""What all tests share: the real images and models beside the checkout, where they are."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the real images and the trained reference models; skips where it is absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"the reference models and images are not at {folder}")
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read models again at once: what tiny networks take differs from reading to reading anyway."""
    monkeypatch.setattr("converter.latency.PAUSE", 0.0)
