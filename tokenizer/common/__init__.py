"""Audio I/O, configuration, checkpoints and errors: what every part stands on."""
