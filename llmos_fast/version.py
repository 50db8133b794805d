"""The one statement of the version; pyproject.toml reads it without importing torch."""

__version__ = "0.1.0"
