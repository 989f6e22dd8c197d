"""Learning block by block: which tokens count, and which parameters move."""

import jax.numpy as jnp
import numpy as np

from sparsejax.compress.block_learning import BlockLearning, in_turn
from sparsejax.compress.blocks import Blocks
from sparsejax.methods.pruning.sequential import with_kernels
from tests.compress import tiny

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12), np.int32)
DOWN, SKIP = "mlp.down", 5


def test_the_loss_leaves_out_leading_tokens_and_parameters_move_by_their_own_rates():
    model = tiny.tiny_model(layers=1)
    kernel = model.parameter(f"blocks.0.{DOWN}.kernel")
    learning = BlockLearning(
        model, lambda w, params: w * params["gain"] + params["shift"], {"gain": 0.05, "shift": 0.0}, epochs=8, skip=SKIP
    )
    blocks = Blocks(model)
    h = blocks.embed(TOKENS)
    target = in_turn(blocks, 0, h)
    np.testing.assert_allclose(target, blocks.run(0, h)[0], atol=1e-5)
    start = {DOWN: {"gain": jnp.asarray(0.5), "shift": jnp.asarray(0.0)}}
    before = learning.mean_loss(0, {DOWN: kernel}, start, h, (target,))
    halved, _ = blocks.run(0, h, values=with_kernels(blocks.values(0), {f"blocks.0.{DOWN}": kernel * 0.5}))
    np.testing.assert_allclose(before, np.square(np.asarray(halved - target))[:, SKIP:].mean(), rtol=1e-4)
    learned = learning.learn(0, {DOWN: kernel}, start, h, (target,))
    assert abs(learned[DOWN]["gain"] - 1) < 0.2 and learned[DOWN]["shift"] == 0
    assert learning.mean_loss(0, {DOWN: kernel}, learned, h, (target,)) < 0.2 * before
