"""Vocal tokens to accompaniment tokens: the dual-track language model."""
