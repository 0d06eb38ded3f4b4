# SPDX-License-Identifier: Apache-2.0
"""The demo's data: 1,797 handwritten digits of 8 x 8 pixels from scikit-learn, so nothing is downloaded.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

__all__ = ["Digits", "load"]

TRAIN_IMAGES, TEST_IMAGES = 1437, 360


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) float32 and classes (N,) int64, in two parts that share no image."""

    train_images: Tensor
    train_classes: Tensor
    test_images: Tensor
    test_classes: Tensor


def load() -> Digits:
    """Return 1,437 training and 360 test digits, always the same, with every class in proportion.

    Pixels are scaled to 0..1 and the training images' mean is subtracted from each, as the paper does for CIFAR.
    """
    bunch = load_digits()
    parts = train_test_split(
        bunch.images,
        bunch.target,
        train_size=TRAIN_IMAGES,
        test_size=TEST_IMAGES,
        stratify=bunch.target,
        random_state=0,
    )
    train_images, test_images = (torch.tensor(p / 16, dtype=torch.float32)[:, None] for p in parts[:2])
    train_classes, test_classes = (torch.tensor(p, dtype=torch.int64) for p in parts[2:])
    mean = train_images.mean(dim=0)
    return Digits(train_images - mean, train_classes, test_images - mean, test_classes)
