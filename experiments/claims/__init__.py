"""Each paper's claim, restated at a size that runs here, as a command: see `experiments.claims.__main__`."""
