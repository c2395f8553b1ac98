"""The one place that holds the version: the package, its metadata and `rocketkv env` all read it here."""

__version__ = "0.1.0"
