"""What is trained on: a source, a tokenizer and a task that turns documents into batches."""

from dataclasses import dataclass


@dataclass
class DataConfig:
    # registry kind "source": stdlib | text:PATH | tfds:NAME | digits | fashion_mnist
    # or synthetic: copy | induction | mqar | modular | dyck | listops
    source: str = "stdlib"
    tokenizer: str = "bytes"  # registry kind "tokenizer": bytes | bpe:VOCAB | file:PATH
    task: str = "causal_lm"  # registry kind "task": causal_lm | prefix_lm | ul2 | masked_lm | classification
    sequence_length: int = 128
    train_images: int = 0  # of an image source the first so many train, epoch after epoch; 0: all
    label_noise: float = 0.0  # share of the training images whose label is replaced by one drawn uniformly, seeded, for good
    packing: bool = True  # several documents per sequence, attention and loss never cross a border
    data_dir: str = ""  # else $SPARSEJAX_DATA, else ./shared/data, else ../shared/data
    prefetch: int = 4  # batches prepared ahead on host threads
