"""Corpora: PopBand, which the project makes for itself, and those of your own recordings."""
