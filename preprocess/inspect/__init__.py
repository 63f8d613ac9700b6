"""Commands that look into a finished output folder: `preprocess sql`, `explain`, `report`."""
