"""The tests. A package, so that tests and scripts can import ``tests.onnx_adapter``."""
