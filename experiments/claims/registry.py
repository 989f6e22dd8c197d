"""All claims."""

from experiments.claims import digits, images, laws, quantization, tables, trained, training_free

CLAIMS = [*training_free.CLAIMS, *tables.CLAIMS, *trained.CLAIMS, *laws.CLAIMS, *images.CLAIMS, *digits.CLAIMS,
          *quantization.CLAIMS]  # fmt: skip
