"""`train bench` and `train plan`: what the loader, the disk and the loop deliver, and what a run would take."""
