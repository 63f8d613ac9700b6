"""Betons, or an image index: plan.py (which row goes where), images.py (JPEG bytes), write.py (the files)."""
