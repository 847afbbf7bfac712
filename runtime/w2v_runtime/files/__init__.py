"""Files on disk that more than one room needs: what stands beside an output, locks, exchanges, large arrays.

Imports no other room.
"""
