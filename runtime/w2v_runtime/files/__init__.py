"""Files on disk that more than one room needs: names beside an output, locks, atomic exchange, large arrays.

Imports no other room.
"""
