"""Cleaning."""
KEYS = {}
