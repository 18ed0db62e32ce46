"""Measuring every part on test songs."""
