# SPDX-License-Identifier: Apache-2.0
"""The networks of Gomez et al. 2017 (five RevNets, and the four ResNets they were compared with), and the reversible
vision transformers of Mangalam et al. 2022.

Every function takes ``num_classes`` and the keywords ``in_channels=3, activations, coupling, backend``; RevNets also
``transitions``, Rev-ViTs ``image_size``, ``drop_path`` and others. See `RevNet`, `ResNet` and `RevViT`.

Other sizes: ``RevNet(Plan("basic", units=(3, 3, 3), widths=(32, 64, 112), stem_width=32), num_classes=10)``.
"""

from revkernels.models.layers import BasicBranch, BottleneckBranch, param_groups
from revkernels.models.plan import Plan
from revkernels.models.resnet import ResNet, resnet32, resnet101, resnet110, resnet164
from revkernels.models.revnet import (
    RevNet,
    Transition,
    revnet38,
    revnet56,
    revnet104,
    revnet110,
    revnet164,
)
from revkernels.models.revvit import RevViT, revvit_base, revvit_large, revvit_small

__all__ = [
    "BasicBranch",
    "BottleneckBranch",
    "Plan",
    "ResNet",
    "RevNet",
    "RevViT",
    "Transition",
    "param_groups",
    "resnet32",
    "resnet101",
    "resnet110",
    "resnet164",
    "revnet38",
    "revnet56",
    "revnet104",
    "revnet110",
    "revnet164",
    "revvit_base",
    "revvit_large",
    "revvit_small",
]
