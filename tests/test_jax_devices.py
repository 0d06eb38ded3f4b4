# SPDX-License-Identifier: Apache-2.0
"""Two devices: steps by `jax.shard_map`, and what `jax.jit` alone makes of arrays that are sharded, by type or not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax_cases import jax

CODE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import revkernels as rk
from revkernels.adapters import jax as rj
from jax_cases import chain_params, furthest, loss_of, mlp, mlp_params, stacked, stream_pair

mesh = Mesh(np.array(jax.devices()), ("batch",))
assert len(mesh.devices) == 2

def branch(p, x):
    h, _ = rj.norm_act(x, rk.Norm("layer", p["b"], p["b"], activation="gelu"))
    return mlp(p, h)

params, streams = chain_params(mlp_params, 2, 8), stream_pair((16, 8))
stacks = [stacked(p) for p in params]
for coupling in ("float", rk.Exact(k=14), rk.Exact(storage="int16", k=9)):
    for apply, own in (
        (rj.reversible([branch] * 2, [branch] * 2, coupling=coupling), params),
        (rj.reversible_scan(branch, branch, coupling=coupling), stacks),
    ):
        spread = jax.shard_map(apply, mesh=mesh, in_specs=(P(), P(), P("batch"), P("batch")), out_specs=P("batch"))
        step = jax.jit(jax.value_and_grad(loss_of(spread), (0, 1, 2, 3)))
        text = step.lower(*own, *streams).compile().as_text()
        assert "all-gather" not in text and "all-reduce" in text
        expected = jax.jit(jax.value_and_grad(loss_of(apply), (0, 1, 2, 3)))(*own, *streams)
        assert furthest(step(*own, *streams), expected) < 1e-6, coupling

# parts of parameters and whole streams: a branch sums over the devices, and JAX must see that its results are equal
def part(p, x):
    h, _ = rj.norm_act(x, rk.Norm("layer", p["n"], p["n"]))
    return lax.psum(jnp.tanh(h @ p["w"]) @ p["v"], "batch") * p["scale"]

def whole(p, x):
    h, _ = rj.norm_act(x, rk.Norm("layer", p["n"], p["n"]))
    return jnp.tanh(h @ p["w"]) @ p["v"] * p["scale"]

def part_params(p):
    return {"w": p["w"], "v": p["v"], "n": p["b"] + 1, "scale": jnp.float32(0.7)}

own = [[part_params(p) for p in ps] for ps in params]
cuts = {"w": P(None, "batch"), "v": P("batch", None), "n": P(), "scale": P()}
loop_cuts = {name: P(None, *cut) for name, cut in cuts.items()}
for coupling in ("float", rk.Exact(k=14)):
    step = jax.value_and_grad(loss_of(rj.reversible([whole] * 2, [whole] * 2, coupling=coupling)), (0, 1, 2, 3))
    loss, (df, dg, *dx) = jax.jit(step)(*own, *streams)
    chain = rj.reversible([part] * 2, [part] * 2, coupling=coupling)
    spread = jax.shard_map(chain, mesh=mesh, in_specs=([cuts] * 2, [cuts] * 2, P(), P()), out_specs=P())
    step = jax.jit(jax.value_and_grad(loss_of(spread), (0, 1, 2, 3)))
    assert furthest(step(*own, *streams), (loss, (df, dg, *dx))) < 1e-3
    loop = rj.reversible_scan(part, part, coupling=coupling)
    spread = jax.shard_map(loop, mesh=mesh, in_specs=(loop_cuts, loop_cuts, P(), P()), out_specs=P())
    step = jax.jit(jax.value_and_grad(loss_of(spread), (0, 1, 2, 3)))
    assert furthest(step(*map(stacked, own), *streams), (loss, (stacked(df), stacked(dg), *dx))) < 1e-3

# NaN on one device alone, in whose part of the batch a stream leaves the range
apply = rj.reversible([branch] * 2, [branch] * 2, coupling=rk.Exact(k=14))
spread = jax.shard_map(apply, mesh=mesh, in_specs=(P(), P(), P("batch"), P("batch")), out_specs=P("batch"))
y1, _ = jax.jit(spread)(*params, streams[0].at[15].set(2000.0), streams[1])
assert np.isfinite(y1[:8]).all() and np.isnan(y1[8:]).all()

# jit alone: right, though XLA gathers the streams for a call that it does not know
rows = NamedSharding(mesh, P("batch"))
apart = [jax.device_put(x, rows) for x in streams]
for backend, gathers in ((None, True), ("xla", False)):
    apply = rj.reversible([mlp] * 2, [mlp] * 2, backend=backend)
    step = jax.jit(jax.grad(loss_of(apply), (0, 1, 2, 3)), in_shardings=(None, None, rows, rows))
    assert ("all-gather" in step.lower(*params, *apart).compile().as_text()) == gathers
    assert furthest(step(*params, *apart), jax.jit(jax.grad(loss_of(apply), (0, 1, 2, 3)))(*params, *streams)) < 1e-6

# explicit axes, as those of jax.make_mesh: types tell shardings, and a derivative has its primal's
if hasattr(jax.sharding, "reshard"):
    explicit = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))
    rows, everywhere = NamedSharding(explicit, P("batch")), NamedSharding(explicit, P())
    apart = [jax.device_put(x, rows) for x in streams]
    for coupling in ("float", rk.Exact(k=14), rk.Exact(storage="int16", k=9)):
        for apply, own in (
            (rj.reversible([branch] * 2, [branch] * 2, coupling=coupling), params),
            (rj.reversible_scan(branch, branch, coupling=coupling), stacks),
        ):
            step = jax.jit(jax.value_and_grad(loss_of(apply), (0, 1, 2, 3)))
            got = step(*jax.device_put(own, everywhere), *apart)
            assert furthest(got, step(*own, *streams)) < 1e-6, coupling
            assert got[1][2].sharding.spec == P("batch", None)
            # a branch of one stream returns that stream's sharding, and adds to the other
            unlike = apart[0], jax.device_put(streams[1], everywhere)
            got = step(*jax.device_put(own, everywhere), *unlike)
            assert furthest(got, step(*own, *streams)) < 1e-6, coupling
            assert [dx.sharding.spec for dx in got[1][2:]] == [P("batch", None), P(None, None)]
print("done")
"""


@pytest.mark.slow
def test_two_devices():
    if not hasattr(jax, "shard_map"):
        pytest.skip("this JAX has no jax.shard_map yet")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parent,  # where jax_cases lies
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")
