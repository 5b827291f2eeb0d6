"""Charter makes a language model follow a written constitution, and keeps it following it in production."""

__version__ = "0.1.0"
