"""Corpora of scores that PopBand is rendered from."""
