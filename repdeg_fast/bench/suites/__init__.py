"""One file an operation: its cases, providers, and counted bytes and operations, as ``SUITE``."""
