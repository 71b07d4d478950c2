"""Several processes, one result: ranges are merged, grids compared, failures shared."""
