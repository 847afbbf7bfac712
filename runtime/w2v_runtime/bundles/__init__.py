"""Bundles on this machine: how they are found, and how a new one is written atomically.

May import files.
"""
