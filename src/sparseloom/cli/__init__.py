"""The `sparseloom` command."""

from sparseloom.cli.boundary import main

__all__ = ["main"]
