"""Closer looks at trained models and trials of alternatives; nothing else imports them."""
