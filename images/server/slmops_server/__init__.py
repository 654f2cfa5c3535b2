"""An OpenAI-compatible server for small language models: one honest front, one engine process behind it."""

__version__ = "0.1.0"
