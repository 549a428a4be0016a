"""Original against converted under onnxruntime: error, agreement, accuracy, latency, size, cost."""
