"""Inference engines: named arrays in, named arrays out. Only this room knows ONNX Runtime, OpenVINO and their options.

``base`` has the protocol :class:`~w2v_runtime.engines.base.Engine`, ``choice`` picks and opens an engine, ``installed``
checks what is installed. An engine takes a batch as it comes; ``w2v_runtime.embedding.batching`` decides the batch.

To add an engine: write a class with the protocol ``Engine`` in a module of its own, add its device and the precisions
it computes to ``base``, its installation check to ``installed``, and open it in ``choice.open_engine``.

May import graphs and threads.
"""
