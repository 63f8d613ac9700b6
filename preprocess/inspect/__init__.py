"""Commands that read a finished output folder: `preprocess verify`, `sql`, `explain`, `report`."""
