"""The one error this package raises for bad input: it says what was found, where, and what to do."""


class DataError(Exception):
    """Data that cannot be used as asked: missing, unreadable, empty, damaged or not matching the model."""
