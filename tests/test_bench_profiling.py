# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step goes: operators are told apart, and the table adds up."""

import json

import pytest

torch = pytest.importorskip("torch")
from test_bench_network import BASELINE, OURS, TINY, rows  # noqa: E402

from revkernels import cli  # noqa: E402
from revkernels.bench import profiling  # noqa: E402
from revkernels.bench.networks import NETWORKS  # noqa: E402


def test_a_profile_says_where_the_time_goes():
    """Every operator is in one of three classes, and none of the first two is empty."""
    shares = {name: row["profile"] for name, row in rows(OURS, profile=True).items()}
    for profile in shares.values():
        assert profile["total"] == pytest.approx(profile["products"] + profile["fusible"] + profile["rest"])
        assert profile["products"] > 0 < profile["fusible"]
    assert "profile" not in rows(OURS)[BASELINE]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (profiling.PRODUCTS, ["aten::mkldnn_convolution", "aten::convolution_backward", "aten::addmm", "aten::bmm"]),
        (profiling.PRODUCTS, ["aten::_scaled_dot_product_flash_attention_for_cpu", "nvjet_sm90_tst_192x192_64x4"]),
        (profiling.FUSIBLE, ["aten::native_batch_norm", "NormActBackward", "aten::threshold_backward", "aten::add_"]),
        (profiling.FUSIBLE, ["void revk::cuda::norm_apply<float, 8>", "aten::gelu_backward", "Couple"]),
    ],
)
def test_operators_are_told_apart(pattern, names):
    other = profiling.FUSIBLE if pattern is profiling.PRODUCTS else profiling.PRODUCTS
    assert all(pattern.search(name) for name in names)
    assert pattern is profiling.PRODUCTS or not any(other.search(name) for name in names)
    for name in ("aten::copy_", "aten::fill_", "aten::cat", "aten::convert_element"):
        assert not profiling.PRODUCTS.search(name) and not profiling.FUSIBLE.search(name)


def test_command_line_profile(tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    words = ["bench", "network", "--network", "tiny", "--rounds", "2", "--only", "store, fused", "--profile"]
    assert cli.main([*words, "--json", str(tmp_path / "n.json")]) == 0
    tables = json.loads((tmp_path / "n.json").read_text())["tables"]
    (table,) = (table for table in tables if table["title"].startswith("where the time goes"))
    assert [row["variant"] for row in table["rows"]] == [BASELINE, "store, fused"]
    assert all(row["floor"] > 0 for row in table["rows"])  # (how large it is, the machine's load decides)
