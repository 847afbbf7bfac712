"""Threads, forked processes and processors: how work is ended, carried through a fork, and spread.

Imports no other room.
"""
