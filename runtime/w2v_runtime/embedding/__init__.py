"""Waveforms to vectors: the model (a bundle and its engine), batches, windows, pooling, and many recordings at once.

May import engines, bundles, audio and the rooms below them.
"""
