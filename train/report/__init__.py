"""`train report`: runs and results as one page."""
