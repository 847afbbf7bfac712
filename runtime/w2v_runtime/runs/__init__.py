"""Runs embed many inputs into one output and can be resumed at any moment: inputs, journal, spool, run, merge.

May import every other room but commands.
"""
