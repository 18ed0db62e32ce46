"""Token shards and training of the language model."""
