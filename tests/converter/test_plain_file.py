"""Plain files and their digests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from converter.plain_file import file_digest


def test_the_digest_is_sha_256_of_the_content(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(3 * 2**20 + 5)
    (tmp_path / "f").write_bytes(data)
    assert file_digest(tmp_path / "f") == hashlib.sha256(data).hexdigest()
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "absent")
