"""All claims."""

from experiments.claims import training_free

CLAIMS = [*training_free.CLAIMS]
