# SPDX-License-Identifier: Apache-2.0
"""``bench passes``: both sides of every trial do the same work, and goals stand where their condition holds."""

import json
from typing import ClassVar

import pytest

torch = pytest.importorskip("torch")
from revkernels import cli  # noqa: E402
from revkernels.bench import passes  # noqa: E402
from revkernels.bench.harness import measure  # noqa: E402
from revkernels.bench.passes import SUITE, PassSetup  # noqa: E402

PAST = [case for case in SUITE.benchmarks[0].cases if case.endswith("past cache")]
KERNELS = [benchmark.name for benchmark in SUITE.benchmarks]


class Setup(PassSetup):
    """With the eager backend too, so that the trials can be tested where no kernel is compiled; keeps the norms."""

    norms: ClassVar[list] = []

    def backends(self):
        return ["eager", *super().backends()]

    def norm(self, case, running):
        self.norms.append(super().norm(case, running))
        return self.norms[-1]


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """So that few operands are past it; and one thread, for several wait for each other in every small call."""
    monkeypatch.setattr(passes, "last_level_cache", lambda device: 1 << 18)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(name, case):
    (benchmark,) = (b for b in SUITE.benchmarks if b.name == name)
    return benchmark.make(Setup(megabytes=1), case)


def tensors(found):
    return [found] if isinstance(found, torch.Tensor) else [t for one in found for t in tensors(one)]


def outcome(function, trial, norm):
    """What a contender returns and writes: in place first, then h, or the parameters' gradients, then running ones."""
    operands = [tensor.clone() for tensor in trial.operands[0]]
    running = [t for t in (norm.running_mean, norm.running_var) if t is not None]
    before = [t.clone() for t in running]
    found = tensors(function(*operands))
    after = [t.clone() for t in running]
    for tensor, old in zip(running, before, strict=True):
        tensor.copy_(old)
    return operands[0], found, after


def assert_close(got, expected, tolerance):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= tolerance, error


@pytest.mark.parametrize("name", KERNELS)
def test_both_sides_do_the_same(name):
    for case in PAST:
        trial = make(name, case)
        norm, tolerance = Setup.norms[-1], 1e-5 if "float32" in case else 2e-2
        written, found, running = outcome(trial.contenders["torch"], trial, norm)
        assert bool(running) == (name in ("norm_act", "couple_norm_act") and case.startswith("batch"))
        for other in trial.contenders.keys() - {"torch"}:
            their_written, theirs, their_running = outcome(trial.contenders[other], trial, norm)
            assert_close(their_written, written, tolerance)
            if name == "norm_act_backward_":
                # torch sums a bfloat16 layer norm's parameter gradients in bfloat16, up to a tenth off.
                loose = 0.3 if "bfloat16" in case and "layer" in case else 1e-4
                for got, expected in zip(theirs[1:], found[1:], strict=True):
                    assert_close(got, expected, loose)
            else:
                y_and_h = found if name == "couple_norm_act" else found[-1:]
                at = 0 if name in ("couple_norm_act", "norm_act") else 1
                for got, expected in zip(theirs[at : at + len(y_and_h)], y_and_h, strict=True):
                    assert_close(got, expected, tolerance)
            for got, expected in zip(their_running, running, strict=True):
                assert_close(got, expected, 1e-4)


def test_a_contender_of_the_recompute_computes_its_statistics():
    """The statistics that are given stand for the forward's: an operand that moved shows who reads them."""
    trial = make("uncouple_norm_act_", PAST[0])
    y, f = trial.operands[0]
    by_torch, given, computed = (
        trial.contenders[n](y * 5, f * 5)[-2 if n != "torch" else 0 :] for n in ("torch", "eager", "eager, computed")
    )
    moved = lambda found: (found[0] - by_torch).abs().max()  # noqa: E731
    assert moved(computed) < 1e-4 < 0.1 < moved(given)


@pytest.mark.parametrize(
    ("name", "batch", "layer"),
    [("norm_act", 3, 2), ("uncouple_norm_act_", 4, 4), ("norm_act_backward_", 6, 4), ("couple_norm_act", 5, 4)],
)
def test_bytes_moved_are_what_a_fused_pass_needs(name, batch, layer):
    for case in PAST:
        trial = make(name, case)
        assert trial.bytes_moved == trial.operands[0][0].nbytes * (batch if case.startswith("batch") else layer)


@pytest.mark.parametrize(("name", "past"), list(zip(KERNELS, (0.70, 0.60, 0.65, 0.75), strict=True)))
def test_goals_hold_where_the_tensors_lie(name, past, monkeypatch):
    def limits(cache):
        monkeypatch.setattr(passes, "last_level_cache", lambda device: cache)
        trials = [make(name, case) for case in (PAST[0], PAST[0].replace("past", "in"))]
        assert all("eager, computed" not in trial.goals for trial in trials)
        return [trial.goals["eager"].at_most if trial.goals else None for trial in trials], trials

    assert limits(1 << 18)[0] == [past, None]
    goals, trials = limits(32 << 20)
    assert goals == [None, 1.0]
    assert len(trials[1].operands) == 1 and trials[1].calls > 1  # so that it stays in the cache
    assert sum(t.nbytes for one in trials[0].operands for t in one) >= 64 << 20


def test_operands_rotate_past_the_cache(monkeypatch):
    monkeypatch.setattr(passes, "last_level_cache", lambda device: 8 << 20)
    trial = make("couple_norm_act", PAST[0])
    assert sum(t.nbytes for one in trial.operands for t in one) >= 16 << 20


def test_a_trial_can_be_measured():
    class Clock:
        def time(self, function, operands):
            for one in operands:
                function(*one)
            return 1e-3

    found = measure("norm_act", PAST[0], make("norm_act", PAST[0]), Clock(), rounds=2, warmup=0)
    assert found[0].variant == "torch" and len(found) >= 2 and found[0].gbps > 0


def test_cases_are_chosen_by_words():
    chosen = SUITE.matching(["couple_norm_act", "NCHW", "in cache"])
    assert {(b.name, *b.cases) for b in chosen.benchmarks} == {
        (name, "batch+relu NCHW float32 in cache", "batch+relu NCHW bfloat16 in cache")
        for name in ("couple_norm_act", "uncouple_norm_act_")
    }
    with pytest.raises(ValueError, match=r"no case has all of \['NHWC'\]"):
        SUITE.matching(["NHWC"])


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(passes, "PassSetup", Setup)
    words = ["bench", "passes", "--megabytes", "1", "--rounds", "2", "--json", str(tmp_path / "p.json")]
    assert cli.main([*words, "--matching", "past cache", "float32", "rows", "--save", str(tmp_path)]) == 0
    (table,) = json.loads((tmp_path / "p.json").read_text())["tables"]
    assert {row["benchmark"] for row in table["rows"]} == set(KERNELS)
    (saved,) = tmp_path.glob("*.jsonl")
    copy, *lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert (copy["benchmark"], copy["case"], copy["bytes_moved"]) == ("copy", "1 MiB", 2 << 20)
    assert len(lines) == len(table["rows"])
    for line, row in zip(lines, table["rows"], strict=True):
        assert line["of_copy"] == row["of_copy"] == pytest.approx(line["gbps"] / copy["gbps"])
    assert all(line["gbps"] > 0 and "--matching 'past cache' float32 rows" in line["command"] for line in lines)
    assert cli.main([*words, "--matching", "NHWC"]) == 2
    assert "--matching: no case has all of ['NHWC']" in capsys.readouterr().err
