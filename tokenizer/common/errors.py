"""Errors a user can fix: each message says what, where, the value, and what to do."""


class DuoTokError(Exception):
    """Base of every error that a command shows as one line."""


class AudioError(DuoTokError):
    """A recording cannot be read, written or used."""


class ConfigError(DuoTokError):
    """A setting is unknown or out of range."""


class CheckpointError(DuoTokError):
    """Stored weights are missing, damaged or belong to another model."""


class DataError(DuoTokError):
    """A manifest, shard or corpus cannot be used."""
