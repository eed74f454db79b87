"""Errors raised by rso_ds. Every message names the key, file or tensor at fault and the remedy."""


class RSOError(RuntimeError):
    """Base class of everything rso_ds raises on purpose."""


class RSOConfigError(RSOError, ValueError):
    """A key of the configuration is unknown, malformed or out of range."""


class RSOConversionError(RSOError):
    """The model cannot be converted the way the configuration asks."""


class RSOUnsupportedError(RSOError):
    """A combination of features in which RSO would not, or not provably, be in effect."""


class RSOReplicaError(RSOError):
    """Ranks that must hold the same bits do not."""


class RSOCheckpointError(RSOError):
    """A checkpoint is missing, damaged, or belongs to another model or configuration."""
