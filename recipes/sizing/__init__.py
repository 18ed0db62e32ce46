"""How large a recipe's model is: parameters, memory per device, and one real training step."""
