"""The side of flowjax 19.1.2 (jax 0.10.2), in an environment without torch: `planar.py` and `spline.py` start it, `harness.Neighbour` talks to it.

One JSON object a line. `build` compiles a case from tensors and answers what it computes from them; `run` calls it `times` times and answers the seconds that took. Everything is compiled (jit) and single precision, jax's default.
"""
import json
import sys
import time

import equinox as eqx
from flowjax.bijections import Planar, RationalQuadraticSpline, Scan
from flowjax.distributions import StandardNormal, Transformed
from flowjax.train import fit_to_key_based_loss
from flowjax.train.losses import ElboLoss
from flowjax.train.train_utils import step
import jax
import jax.numpy as jnp
import jax.random as jr
import optax


def stack(params):
    """Planar layers from `(K, 2 D + 1)` numbers `w, u, b` each, one after the other."""
    dim = (params.shape[-1] - 1) // 2
    layers = eqx.filter_vmap(lambda key: Planar(key, dim=dim))(jr.split(jr.key(0), len(params)))
    return Scan(eqx.tree_at(lambda layer: layer.params, layers, params))


def log_density(z):
    """U1 of Rezende & Mohamed 2015, at one point."""
    ring = -.5 * ((jnp.linalg.norm(z) - 2) / .4) ** 2
    return ring + jnp.logaddexp(-.5 * ((z[0] - 2) / .6) ** 2, -.5 * ((z[0] + 2) / .6) ** 2)


def fit(params, z, samples):
    """Training steps on U1, by the loop of the library and bare; the answer: values, log-dets, and log-densities of the target."""
    dist, loss, optimizer = Transformed(StandardNormal((2,)), stack(params)), ElboLoss(log_density, samples), optax.adam(1e-3)
    state = {"library": dist, "bare": eqx.partition(dist, eqx.is_inexact_array)[0], "key": jr.key(1)}
    static, state["optimizer"] = eqx.partition(dist, eqx.is_inexact_array)[1], optimizer.init(state["bare"])

    def library(times):
        state["key"], key = jr.split(state["key"])
        state["library"], _ = fit_to_key_based_loss(key, state["library"], loss_fn=loss, steps=times, optimizer=optimizer, show_progress=False)

    def bare(times):
        for key in jr.split(state["key"], times):
            state["bare"], state["optimizer"], value = step(state["bare"], static, key=key, optimizer=optimizer, opt_state=state["optimizer"], loss_fn=loss)
        jax.block_until_ready(value); state["key"] = key

    y, log_det = jax.vmap(dist.bijection.transform_and_log_det)(z)
    return {"fit": library, "step": bare}, (y, log_det, jax.vmap(log_density)(y))


def compiled(name, function, arguments, cotangents):
    """Forward and backward of `function(*arguments)` in one program; the answer: values and gradients."""
    def both(arguments, cotangents):
        values, back = jax.vjp(function, *arguments)
        return *values, *back(cotangents)
    both = jax.jit(both)

    def call(times):
        for _ in range(times): jax.block_until_ready(both(arguments, cotangents))
    return {name: call}, both(arguments, cotangents)


def amortised(params, z, gy, gl):
    """A stack whose parameters `(batch, K, 2 D + 1)` differ from row to row of `z`."""
    return compiled("amortised", lambda params, z: jax.vmap(lambda params, z: stack(params).transform_and_log_det(z))(params, z), (params, z), (gy, gl))


def spline(theta, z, gy, gl, bound, inverse):
    """Splines with parameters of their own: widths and heights before the softmax, slopes at all knots before the softplus."""
    def one(theta, z):
        bins = (theta.shape[-1] - 1) // 3
        law = RationalQuadraticSpline(knots=bins - 1, interval=bound, min_width=2e-3 * bound)
        law = eqx.tree_at(lambda law: (law.x_pos.arr, law.y_pos.arr, law.derivatives.args[0]), law, (theta[:bins], theta[bins:2 * bins], theta[2 * bins:]))
        law = eqx.tree_at(lambda law: (law.x_pos, law.y_pos, law.derivatives), law, (law.x_pos.unwrap(), law.y_pos.unwrap(), law.derivatives.unwrap()))
        return (law.inverse_and_log_det if inverse else law.transform_and_log_det)(z)
    return compiled("pull" if inverse else "push", jax.vmap(one), (theta, z), (gy, gl))


known, calls = {"fit": fit, "amortised": amortised, "spline": spline}, {}
for line in sys.stdin:
    question = json.loads(line)
    if "build" in question:
        build = known[question.pop("build")]
        made, answer = build(**{name: jnp.asarray(value, jnp.float32) if isinstance(value, list) else value for name, value in question.items()})
        calls |= made
        answer = [value.tolist() for value in answer]
    else:
        wall, cpu = time.perf_counter(), time.process_time()
        calls[question["run"]](question["times"])
        answer = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    print(json.dumps(answer), flush=True)
