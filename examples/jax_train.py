# SPDX-License-Identifier: Apache-2.0
"""Train a reversible residual network on handwritten digits with JAX, and print what it needs of memory.

    pip install '.[jax]' scikit-learn          # in a checkout
    python examples/jax_train.py --blocks 12 --epochs 30

All blocks are one `reversible_scan`: activations are reconstructed from the outputs, so that a deeper network needs no
more memory for them, and takes no longer to compile.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from sklearn.datasets import load_digits

from revkernels.adapters.jax import reversible_scan

PIXELS, WIDTH, BATCH = 64, 64, 256  # of an image, of a stream, images


def branch(p, x):
    """A residual function: layer norm, a layer twice as wide, GELU, and back."""
    center = x.mean(-1, keepdims=True)
    x = (x - center) * lax.rsqrt(((x - center) ** 2).mean(-1, keepdims=True) + 1e-5)
    return jax.nn.gelu(x @ p["inner"]) @ p["outer"]


def plain_scan(f_params, g_params, x1, x2):
    """The same network, every activation stored, to compare with."""

    def block(streams, params):
        x1, x2 = streams
        x1 = x1 + branch(params[0], x2)
        return (x1, x2 + branch(params[1], x1)), None

    return lax.scan(block, (x1, x2), (f_params, g_params))[0]


def initial(key, blocks):
    """Parameters; those of the blocks have a dimension in front that counts them. Each starts as the identity."""
    stem, head, *keys = jax.random.split(key, 4)
    f, g = (
        {
            "inner": jax.random.normal(key, (blocks, WIDTH, 2 * WIDTH)) * (2 / WIDTH) ** 0.5,
            "outer": jnp.zeros((blocks, 2 * WIDTH, WIDTH)),
        }
        for key in keys
    )
    return {
        "stem": jax.random.normal(stem, (PIXELS, 2 * WIDTH)) / PIXELS**0.5,
        "f": f,
        "g": g,
        "head": jax.random.normal(head, (2 * WIDTH, 10)) * 0.1,
    }


def make_step(apply, rate=0.02, momentum=0.9):
    """One step of gradient descent with momentum, the memory of what it replaces being used again."""

    def logits(params, images):
        x1, x2 = jnp.split(images @ params["stem"], 2, axis=-1)
        y1, y2 = apply(params["f"], params["g"], x1, x2)
        return jnp.concatenate([y1, y2], axis=-1) @ params["head"]

    def loss(params, images, labels):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits(params, images)), labels[:, None], 1).mean()

    def step(params, velocity, images, labels):
        value, gradient = jax.value_and_grad(loss)(params, images, labels)
        velocity = jax.tree.map(lambda v, d: momentum * v - rate * d, velocity, gradient)
        return jax.tree.map(jnp.add, params, velocity), velocity, value

    def accuracy(params, images, labels):
        return (logits(params, images).argmax(-1) == labels).mean()

    return jax.jit(step, donate_argnums=(0, 1)), jax.jit(accuracy)


def temporary_mib(apply, params, images, labels):
    """What XLA plans for a step beside its arguments and results."""
    step, _ = make_step(apply)
    program = step.lower(params, params, images, labels).compile()
    return program.memory_analysis().temp_size_in_bytes / 2**20


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args(argv)
    if min(options.blocks, options.epochs) < 1:
        parser.error("--blocks and --epochs must be at least 1")

    digits = load_digits()
    images, labels = (digits.data / 8 - 1).astype("float32"), digits.target
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1437], order[1437:]  # four fifths, and the rest

    apply = reversible_scan(branch, branch)
    params = initial(jax.random.key(0), options.blocks)
    for blocks in (options.blocks, 4 * options.blocks):
        shapes = jax.eval_shape(lambda key, blocks=blocks: initial(key, blocks), jax.random.key(0))
        rebuilt, stored = (temporary_mib(way, shapes, images[:BATCH], labels[:BATCH]) for way in (apply, plain_scan))
        gradients = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) / 2**20
        print(
            f"{blocks} blocks: {rebuilt:.1f} MiB of temporary memory, {gradients:.1f} of it parameters' gradients; "
            f"{stored:.1f} MiB where activations are stored"
        )

    step, accuracy = make_step(apply)
    velocity = jax.tree.map(jnp.zeros_like, params)
    start = time.perf_counter()
    for epoch in range(options.epochs):
        batches = np.random.default_rng(epoch).permutation(train)[: len(train) // BATCH * BATCH].reshape(-1, BATCH)
        for batch in batches:
            params, velocity, value = step(params, velocity, images[batch], labels[batch])
    right = float(accuracy(params, images[test], labels[test]))
    seconds = time.perf_counter() - start
    print(f"{options.epochs} epochs in {seconds:.1f} s: loss {float(value):.3f}, {right:.1%} of the test digits right")
    return right


if __name__ == "__main__":
    main()
