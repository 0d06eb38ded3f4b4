# SPDX-License-Identifier: Apache-2.0
"""`memory_report` of reversible chains: what they keep and rebuild at any depth, and what is held outside of them."""

import pytest

torch = pytest.importorskip("torch")
from diagnostics_cases import images, mlp  # noqa: E402
from one_thread import one_thread_here  # noqa: E402, F401
from torch import nn  # noqa: E402

from revkernels.diagnostics import memory_report  # noqa: E402
from revkernels.diagnostics.report import CHAIN, SAVED  # noqa: E402
from revkernels.models import revnet38  # noqa: E402
from revkernels.nn import ReversibleBlock, ReversibleSequential  # noqa: E402


def test_a_reversible_chain_is_flat_in_depth():
    x = torch.randn(8, 16, 12, 12)
    reports = [memory_report(images(blocks), x) for blocks in (2, 8, 32)]
    statistics = 2 * 8 * 4  # of one batch norm
    for report, blocks in zip(reports, (2, 8, 32), strict=True):
        growth = report.held_bytes - reports[0].held_bytes
        assert growth == (blocks - 2) * 2 * 2 * statistics  # two branches a block, two norms a branch
        assert report.total(SAVED) <= 2 * x.nbytes
        assert report.chains[0].half_steps == 2 * blocks
        assert report.chains[0].largest_frame_bytes == reports[0].chains[0].largest_frame_bytes
    stored = [memory_report(images(blocks, activations="store"), x).held_bytes for blocks in (2, 8)]
    assert stored[1] > 3.5 * stored[0]


def test_outputs_kept_by_a_chain_inside_a_model():
    net = nn.Sequential(nn.Conv2d(3, 16, 1), images(2), nn.Flatten(), nn.Linear(16 * 64, 5))
    report = memory_report(net, torch.randn(4, 3, 8, 8))
    y = 4 * 16 * 8 * 8 * 4
    (kept,) = (row for row in report.rows if row.kind == CHAIN and row.holder == "its outputs")
    assert (kept.module, kept.bytes) == ("1", y)
    assert report.chains[0].chain == "1"
    assert report.chains[0].kept_bytes == y
    assert not report.chains[0].stored


def test_the_largest_recompute_is_found():
    wide = 100 * 16
    net = ReversibleSequential(
        ReversibleBlock(mlp(16), mlp(16)), ReversibleBlock(mlp(16), mlp(16, wide)), ReversibleBlock(mlp(16), mlp(16))
    )
    (chain,) = memory_report(net, torch.randn(32, 32)).chains
    assert chain.largest_frame == "block 1, branch G (Sequential)"
    hidden, normed, statistics = 32 * wide * 4, 32 * 16 * 4, 2 * 32 * 4
    assert chain.largest_frame_bytes == hidden + normed + statistics


def test_frozen_and_stored_chains():
    net = images(2).requires_grad_(False)
    report = memory_report(net, torch.randn(2, 16, 8, 8).requires_grad_())
    assert not report.chains[0].stored
    stored = memory_report(images(2, activations="store"), torch.randn(2, 16, 8, 8))
    assert stored.chains[0].stored
    assert stored.chains[0].largest_frame is None
    assert any("activations='reconstruct' would reconstruct" in sentence for sentence in stored.advice)


def test_a_stem_that_holds_most_is_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(4))
            self.chain = images(2)

        def forward(self, x):
            return self.chain(self.stem(x))

    report = memory_report(Model(), torch.randn(4, 3, 32, 32))
    assert next(iter(report.by_module(1))) == "stem"
    assert any(sentence.startswith("stem holds ") for sentence in report.advice)


def test_what_is_outside_the_chains_of_a_network():
    x = torch.randn(4, 3, 32, 32)
    report = memory_report(revnet38(), x)
    groups = report.outside_chains()
    assert set(list(groups)[:4]) == {"stages.0.0", "stages.1.0", "stages.2.0", "stem"}
    assert sum(groups.values()) > 0.5 * report.held_bytes
    (sentence,) = (s for s in report.advice if "outside any reversible chain" in s)
    assert "most of them here: stages.0.0 (" in sentence
    stored = memory_report(revnet38(activations="store"), x)
    assert any(s.startswith("stages.0.1 and 2 more chains store ") for s in stored.advice)
    assert stored.held_bytes > 2 * report.held_bytes
