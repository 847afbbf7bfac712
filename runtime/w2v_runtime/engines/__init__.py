"""Arrays in, arrays out: the protocol of an engine, what is installed, which is chosen, and each engine.

The only room that knows ONNX Runtime, OpenVINO and their options. May import graphs and threads.
"""
