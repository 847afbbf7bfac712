"""Where bundles are on this machine, and how one takes its place there.

May import files.
"""
