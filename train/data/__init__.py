"""Training data: open.py (mixture, dataset, files), order.py, loader.py (image_index, decode, resize), inputs.py."""
