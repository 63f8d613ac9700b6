"""Losses of padded label ids and IDF weights (head.py, kinds/), and CLIP's loss (contrastive.py)."""
