"""`train bench`: what the loader, the disk and the loop give here, and which device rates that feeds."""
