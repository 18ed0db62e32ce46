"""Separation by tokens (arXiv 2604.09371): a language model writes the codes of each track of a mixture."""
