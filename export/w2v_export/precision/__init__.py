"""int8 and fp16: ``int8`` decides which matrix products are quantised, ``fp16`` whether a model can be float16."""
