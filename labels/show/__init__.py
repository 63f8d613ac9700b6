"""What people read: the explanation of a sample, HTML pages, text on a terminal."""
