"""The ONNX graphs of a bundle: read, checked and cut to some outputs without the onnx package, and opened as sessions.

May import threads.
"""
