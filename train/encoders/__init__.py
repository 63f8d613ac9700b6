"""Frozen encoders by name: load.py; text.py is the text side of those that have one."""
