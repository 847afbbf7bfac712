"""The modules that are exported to ONNX: front ends, encoders, pooling, and their int8 and fp16 forms."""
