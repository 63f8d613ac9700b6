"""Data sets of the evaluations: sets.py (classes), captions.py (captions), images.py (the images of both)."""
