"""Definitions in plain PyTorch: what every kernel is tested against, and the backend that always serves."""
