# SPDX-License-Identifier: Apache-2.0
"""The model's word on a call: refused, beyond what anybody can know, or what its arguments mean."""

from types import SimpleNamespace

from abi import model, norm_model


def facts(call):
    """The arrays and options that a call is about, and ``arrays``, all of the former.

    Raises `RefusedError` or `UnknownError` of `abi.model`.
    """
    judge = model.Judge()
    found = _ENTRIES[call["entry"]](call, judge)
    judge.where(call["where"])
    judge.finish()
    return SimpleNamespace(**found, arrays=judge.arrays)


def _couple(call, judge):
    subtract = call["entry"] == "revk_uncouple"
    out, x = (judge.view(call[name], name, stream=True) for name in (("x", "y") if subtract else ("y", "x")))
    f = judge.view(call["f"], "f")
    coupling = model.coupled(judge, out, x, f, call["coupling"])
    return {"out": out, "x": x, "f": f, "coupling": coupling, "subtract": subtract}


def _reverse_step(call, judge):
    y = judge.view(call["y"], "y", stream=True)
    f, dy, df = (judge.view(call[name], name) for name in ("f", "dy", "df"))
    coupling = model.reversed_step(judge, y, f, dy, df, call["coupling"])
    return {"out": y, "x": y, "f": f, "dy": dy, "df": df, "coupling": coupling, "subtract": True}


def _accumulate(call, judge):
    totals, parts = model.accumulated(judge, call)
    return {"totals": totals, "parts": parts}


def _norm_act(call, judge):
    h, x = judge.view(call["h"], "h"), judge.view(call["x"], "x")
    return {"h": h, "s": x, "norm": norm_model.normalised(judge, h, x, call["norm"])}


def _coupled_norm_act(call, judge):
    subtract = call["entry"] == "revk_uncouple_norm_act"
    h, f = judge.view(call["h"], "h"), judge.view(call["f"], "f")
    s, x = (judge.view(call[name], name) for name in (("x", "y") if subtract else ("y", "x")))
    norm = norm_model.coupled_and_normalised(judge, h, s, x, f, call["norm"])
    return {"h": h, "s": s, "x": x, "f": f, "norm": norm, "out": s, "coupling": None, "subtract": subtract}


def _norm_act_backward(call, judge):
    dx, base, dh, x, norm, gradient = norm_model.differentiated(judge, call)
    return {"dx": dx, "base": base, "dh": dh, "x": x, "norm": norm, "gradient": gradient}


def _norm_workspace(call, judge):
    norm_model.asked_for_a_workspace(judge, call)
    return {}


def _synchronize(call, judge):
    return {}


_ENTRIES = {
    "revk_couple": _couple,
    "revk_uncouple": _couple,
    "revk_reverse_step": _reverse_step,
    "revk_accumulate": _accumulate,
    "revk_norm_act": _norm_act,
    "revk_couple_norm_act": _coupled_norm_act,
    "revk_uncouple_norm_act": _coupled_norm_act,
    "revk_norm_act_backward": _norm_act_backward,
    "revk_norm_workspace": _norm_workspace,
    "revk_synchronize": _synchronize,
}
