"""The commands, a file each, and the terminal that they share.

May import every other room, and is imported by none.
"""
