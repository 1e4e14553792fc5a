"""The error of files that cannot be read."""


class FileError(ValueError):
    """A file that is damaged, foreign, or newer than this library; names the entry."""
