"""What each choice of the tokenizer recipe is worth: variants under equal budgets, one table (P D)."""
