"""Listening tests: the page that is rated, and what the ratings say."""
