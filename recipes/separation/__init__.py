"""Separators: a mix in, the four stems vocal, drums, bass and other out."""
