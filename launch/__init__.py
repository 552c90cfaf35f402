"""How a run starts: command line, recipe, run directory, workers."""
