"""torch to ONNX: one graph per operation and the Triton repository entries around them."""
