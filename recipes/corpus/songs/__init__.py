"""A corpus from recordings: stems, singing, sentences, cuts."""
