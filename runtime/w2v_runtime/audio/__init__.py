"""A file, bytes or an array to mono float32 samples at the model's rate.

Imports no other room.
"""
