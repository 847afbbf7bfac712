"""Many inputs to a finished output that can be resumed at any moment: inputs, the run, its journal, merging.

May import every other room but commands.
"""
