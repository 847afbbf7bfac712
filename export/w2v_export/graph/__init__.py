"""The inference form of a speech encoder: raw samples and lengths in, named outputs out."""
