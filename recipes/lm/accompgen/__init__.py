"""AccompGen: tokens of all kinds, and the training of its three stages."""
