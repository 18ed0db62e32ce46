"""Renderer: tokens to 48 kHz stereo sound (P 3.4)."""
