"""Measurements; nothing here is installed with Harmony."""
