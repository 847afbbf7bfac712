"""Worker threads, stopping them, forked processes, and the number of processors.

Imports no other room.
"""
