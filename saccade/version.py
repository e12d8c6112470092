"""The version of the package; pyproject.toml says the same (tested)."""

__version__ = "0.1.0"
