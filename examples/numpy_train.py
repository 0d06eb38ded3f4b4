# SPDX-License-Identifier: Apache-2.0
"""Trains a reversible MLP on handwritten digits with NumPy alone: no autograd, no torch.

    python examples/numpy_train.py [--blocks 8] [--epochs 12]

The data are scikit-learn's digits (1,797 images of 8x8), or ten noisy patterns where scikit-learn is missing. Every
residual function is a layer norm with GELU (`rk.ops.norm_act`, one pass) and a linear layer. Its derivative is written
below, by hand: `rk.ops.norm_act_backward_` accumulates into dx. The chain keeps its two outputs for the backward,
however deep it is, which is measured at the end.
"""

import argparse
import time
import tracemalloc

import numpy as np

import revkernels as rk
from revkernels.adapters.numpy import ReversibleChain


class NormGeluLinear:
    """f = gelu(layernorm(x)) W + b, for rows x of `width` elements."""

    def __init__(self, width, rng):
        self.parameters = [
            np.ones(width, np.float32),
            np.zeros(width, np.float32),
            (rng.standard_normal((width, width)) * width**-0.5).astype(np.float32),
            np.zeros(width, np.float32),
        ]

    def norm(self):
        scale, shift = self.parameters[:2]
        return rk.Norm("layer", weight=scale, bias=shift, activation="gelu")

    def __call__(self, x):
        h, _ = rk.ops.norm_act(x, self.norm())
        return h @ self.parameters[2] + self.parameters[3]

    def vjp(self, x):
        """f, and the function from df to dx and the gradients of the four parameters."""
        norm = self.norm()
        h, statistics = rk.ops.norm_act(x, norm)
        f = h @ self.parameters[2] + self.parameters[3]

        def pullback(df):
            dW, db = h.T @ df, df.sum(axis=0)
            dh = df @ self.parameters[2].T
            dx, dscale, dshift = rk.ops.norm_act_backward_(np.zeros_like(x), dh, x, norm, statistics)
            return dx, [dscale, dshift, dW, db]

        return f, pullback


class Network:
    """A linear stem into two streams, reversible blocks, a linear head."""

    def __init__(self, pixels, classes, blocks, width=32, seed=0):
        rng = np.random.default_rng(seed)
        self.width = width
        self.stem = (rng.standard_normal((pixels, 2 * width)) * pixels**-0.5).astype(np.float32)
        self.head = np.zeros((2 * width, classes), np.float32)
        self.branches = [NormGeluLinear(width, rng) for _ in range(2 * blocks)]
        self.chain = ReversibleChain(list(zip(self.branches[::2], self.branches[1::2], strict=True)))

    def parameters(self):
        return [self.stem, self.head, *(p for branch in self.branches for p in branch.parameters)]

    def enter(self, images):
        streams = images @ self.stem
        return streams[:, : self.width], streams[:, self.width :]  # halves of one array: nothing is copied

    def logits(self, images):
        return np.concatenate(self.chain.forward(*self.enter(images)), axis=1) @ self.head

    def step(self, images, labels):
        """The mean cross entropy of a batch and its gradients, in the order of `parameters`."""
        y1, y2 = self.chain.forward(*self.enter(images))
        y = np.concatenate([y1, y2], axis=1)
        logits = y @ self.head
        logits -= logits.max(axis=1, keepdims=True)
        odds = np.exp(logits)
        odds /= odds.sum(axis=1, keepdims=True)
        rows = np.arange(len(labels))
        loss = -np.log(odds[rows, labels]).mean()
        odds[rows, labels] -= 1
        dlogits = odds / len(labels)
        dy = dlogits @ self.head.T
        dy1, dy2 = dy[:, : self.width], dy[:, self.width :]
        _, _, gradients = self.chain.backward_(y1, y2, dy1, dy2)  # dy is the gradient of the chain's input now
        in_blocks = [g for block in gradients for branch in block for g in branch]
        return loss, [images.T @ dy, y.T @ dlogits, *in_blocks]


def adam(parameters, rate=3e-3, decay=(0.9, 0.99)):
    """Return the function that takes one step of Adam, in place."""
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]
    count = 0

    def update(gradients):
        nonlocal count
        count += 1
        size = rate * (1 - decay[1] ** count) ** 0.5 / (1 - decay[0] ** count)
        for p, g, (mean, square) in zip(parameters, gradients, moments, strict=True):
            mean += (1 - decay[0]) * (g - mean)
            square += (1 - decay[1]) * (g * g - square)
            p -= size * mean / (np.sqrt(square) + 1e-8)

    return update


def digits():
    """Images in 0..1, labels, and where they come from."""
    try:
        from sklearn.datasets import load_digits

        data, labels = load_digits(return_X_y=True)
        return (data / 16).astype(np.float32), labels, "scikit-learn's digits"
    except ModuleNotFoundError:
        rng = np.random.default_rng(1)
        labels = rng.integers(0, 10, 1797)
        noise = rng.standard_normal((1797, 64))
        return (rng.random((10, 64))[labels] + noise / 2).astype(np.float32), labels, "ten noisy patterns"


def bytes_kept(blocks, images):
    """What a forward leaves for the backward: reversible, and with every branch's intermediates stored."""
    network = Network(images.shape[1], 10, blocks)
    found = []
    for stored in (False, True):
        x1, x2 = network.enter(images)
        tracemalloc.start()
        kept = []
        if stored:
            for F, G in network.chain.blocks:
                f, backward_of_f = F.vjp(x2)
                x1 = rk.ops.couple(x1, f)
                g, backward_of_g = G.vjp(x1)
                x2 = rk.ops.couple(x2, g)
                kept += [backward_of_f, backward_of_g]
            del f, g
        else:
            kept += network.chain.forward(x1, x2)
        found.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=8, help="reversible blocks, two branches each (default: 8)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the data (default: 12)")
    args = parser.parse_args()
    if min(args.blocks, args.epochs) < 1:
        parser.error("--blocks and --epochs must be at least 1")

    images, labels, source = digits()
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:1437], order[1437:]
    network = Network(images.shape[1], 10, args.blocks)
    update = adam(network.parameters())
    rng, begin = np.random.default_rng(0), time.perf_counter()
    for epoch in range(args.epochs):
        losses = []
        for batch in np.array_split(rng.permutation(train), 23):
            loss, gradients = network.step(images[batch], labels[batch])
            update(gradients)
            losses.append(loss)
        print(f"epoch {epoch + 1:2}: loss {np.mean(losses):.4f}")
    seconds = time.perf_counter() - begin
    accuracy = (network.logits(images[test]).argmax(axis=1) == labels[test]).mean()
    print(f"{source}: test accuracy {accuracy:.1%} after {args.epochs} epochs, {args.blocks} blocks, {seconds:.1f} s")
    print("kept for the backward of a batch of 64, KiB")
    for blocks in (4, 16, 64):
        reversible, stored = bytes_kept(blocks, images[:64])
        print(f"{blocks:4} blocks: reversible {reversible / 1024:7.1f}    stored {stored / 1024:8.1f}")


if __name__ == "__main__":
    main()
