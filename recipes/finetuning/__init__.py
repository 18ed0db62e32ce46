"""The parts of `finetune`: listening to songs, low-rank adapters, the held-out loss, the loop, the result."""
