"""Training of the tokenizer: stages 1 to 3."""
