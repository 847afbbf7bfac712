"""The ONNX files of a bundle: read, checked and cut without the onnx package, and opened once for each request.

May import threads.
"""
