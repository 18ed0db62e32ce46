"""The default model: its bundle and the commands that made it."""
