"""int8 and fp16: which products are rounded, and the gates of accuracy that a rounded graph must pass."""
