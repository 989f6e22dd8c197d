"""A ViT on Fashion-MNIST (Debian's dataset-fashion-mnist, or the TFDS set of that name).

    python -m experiments.train --config configs/vit_fashion_mnist.py
    python -m experiments.train --config configs/vit_fashion_mnist.py --config.data.label_noise=0.4     two fifths drawn anew
    python -m experiments.train --config configs/vit_fashion_mnist.py --config.evaluate.corruptions=gaussian_noise:1

Hardware: one GPU, about 5 minutes; 2 CPU cores, about an hour. Size: 1.2 M parameters.
Expected: not measured at full length yet.
Measured with 2 layers of 64, patches of 7 and 1,000 steps of 64 on the first 4,000 images (2 seeds, 2,048 held-out images):
ReLU 80.3 % at a calibration error of 11.6 %, the top-k of 5 % of the units 80.5 % at 11.8 %; 70.3 and 66.7 % under label noise.
"""

from configs import vit_digits
from sparsejax.config import ExperimentConfig
from sparsejax.models.config import VisionConfig
from sparsejax.plugs import check


def get_config(arg: str = "") -> ExperimentConfig:
    check(not arg, "vit_fashion_mnist", arg, "takes no argument")
    config = vit_digits.get_config()
    config.name = "vit_fashion_mnist"
    config.steps, config.batch_size = 6000, 128
    config.model.num_layers, config.model.d_model = 6, 128
    config.model.vision = VisionConfig(image_size=28, channels=1, patch_size=4)
    config.data.source = "fashion_mnist"
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-3, 300
    config.checkpoint.every, config.evaluate.every, config.evaluate.batches = 1000, 1000, 78
    return config
