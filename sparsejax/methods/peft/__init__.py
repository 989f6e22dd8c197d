"""Fine-tuning of few parameters beside frozen weights: `optimizer.train = ("adapter",)` trains them alone."""
