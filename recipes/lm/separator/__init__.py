"""Training of the separation by tokens."""
