"""Results that several tests show."""

from __future__ import annotations

import onnx
import pytest

from converter.latency import Speedup
from converter.quantization.judge import Deviation
from converter.quantization.quantizing import InTurns, Quantized
from converter.quantization.search import LeftInFloat, Trial


@pytest.fixture
def quantized() -> Quantized:
    """An int8 model, twice as fast, with one layer in float."""
    return Quantized(
        model=onnx.ModelProto(),
        shipped=True,
        precision="int8",
        types="u8 × s7",
        ranges="entropy",
        layers=2,
        balanced=1,
        left=(LeftInFloat(("conv1",), 0.5),),
        trials=(
            Trial("u8 × s8, min-max", 0, 0.03, 0.9, 0.7),
            Trial("u8 × s7, entropy", 1, 0.0021, 0.97, 0.8),
        ),
        before=Deviation(0.01, 0.95),
        after=Deviation(0.012, 0.945),
        images=1800,
        held_out=200,
        bytes_before=4 * 2**20,
        bytes_after=2**20,
        latency=InTurns(
            *("cpu", 1, 8, 12.0, 6.0, 4.0), Speedup(3.0, 2.9, 3.1), Speedup(1.5, 1.4, 1.6)
        ),
        notes=("a note",),
    )
