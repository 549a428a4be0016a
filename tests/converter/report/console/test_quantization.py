"""What a quantization shows."""

from __future__ import annotations

from pathlib import Path

from converter.quantization.quantizing import Quantized
from converter.report.console.quantization import print_quantization
from tests.converter.report.console.samples import line_with, wide


def test_quantization_shows_what_was_tried_and_what_came_of_it(quantized: Quantized) -> None:
    console, stream = wide()
    print_quantization(quantized, Path("q.onnx"), console)
    text = stream.getvalue()
    assert line_with(text, "u8 × s7, entropy").split()[-7:] == [
        *("1", "0.21", "%", "97.0", "%", "×", "0.80")
    ]
    assert (
        "quantized   int8, activations × weights u8 × s7, ranges by entropy of 1,800 images\n"
        "balanced    channels between factors, 1 times\n"
        "in float    1 of 2 layers: conv1\n"
        "off by      1 % → 1.2 % from the original, the same best class for 95.00 → 94.50 % of 200 held-out "
        "images\n"
        "size        4.00 → 1.00 MiB  (÷ 4.00)\n"
        "latency     original 12.0 ms, float 6.00 ms, quantized 4.00 ms  (batch 8, cpu, 1 thread)\n"
        "            3.00 (2.90–3.10) times as fast as the original, 1.50 (1.40–1.60) times as the float "
        "model\n"
        "unconverted the original in int8: off by 0.2 %, the same best class for 99.00 %, 3.00 MiB\n"
        "            it takes 5.00 ms; the quantized conversion is 1.25 (1.20–1.30) times as fast\n"
        "note: a note\n"
        "model       q.onnx\n"
    ) in text
