"""Embeddings where people work: pandas and scikit-learn. Each module imports its library, and nothing imports them.

May import every room below the commands.
"""
