"""The side of flowjax 19.1.2 (jax 0.10.2), in an environment without torch: `planar.py`,
`spline.py`, `vae_step.py`, `iaf_step.py` and `nsf_step.py` start it, `harness.Neighbour` talks to it.

One JSON object a line. `build` compiles a case from tensors and answers what it computes from them;
`run` calls it `times` times and answers the seconds that took. Everything is compiled (jit) and
single precision, jax's default.
"""

import json
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from flowjax.bijections import Planar, RationalQuadraticSpline, Scan
from flowjax.distributions import StandardNormal, Transformed
from flowjax.flows import masked_autoregressive_flow
from flowjax.train import fit_to_key_based_loss
from flowjax.train.losses import ElboLoss
from flowjax.train.train_utils import step


def stack(params):
    """Planar layers from `(K, 2 D + 1)` numbers `w, u, b` each, one after the other."""
    dim = (params.shape[-1] - 1) // 2
    layers = eqx.filter_vmap(lambda key: Planar(key, dim=dim))(jr.split(jr.key(0), len(params)))
    return Scan(eqx.tree_at(lambda layer: layer.params, layers, params))


def log_density(z):
    """U1 of Rezende & Mohamed 2015, at one point."""
    ring = -0.5 * ((jnp.linalg.norm(z) - 2) / 0.4) ** 2
    return ring + jnp.logaddexp(-0.5 * ((z[0] - 2) / 0.6) ** 2, -0.5 * ((z[0] + 2) / 0.6) ** 2)


def fit(params, z, samples):
    """Training steps on U1, by the loop of the library and bare; the answer: values, log-dets, and
    log-densities of the target.
    """
    dist = Transformed(StandardNormal((2,)), stack(params))
    loss = ElboLoss(log_density, samples)
    optimizer = optax.adam(1e-3)
    state = {"library": dist, "bare": eqx.partition(dist, eqx.is_inexact_array)[0], "key": jr.key(1)}
    static = eqx.partition(dist, eqx.is_inexact_array)[1]
    state["optimizer"] = optimizer.init(state["bare"])

    def library(times):
        state["key"], key = jr.split(state["key"])
        state["library"], _ = fit_to_key_based_loss(
            key, state["library"], loss_fn=loss, steps=times, optimizer=optimizer, show_progress=False
        )

    def bare(times):
        for key in jr.split(state["key"], times):
            state["bare"], state["optimizer"], value = step(
                state["bare"],
                static,
                key=key,
                optimizer=optimizer,
                opt_state=state["optimizer"],
                loss_fn=loss,
            )
        jax.block_until_ready(value)
        state["key"] = key

    y, log_det = jax.vmap(dist.bijection.transform_and_log_det)(z)
    return {"fit": library, "step": bare}, (y, log_det, jax.vmap(log_density)(y))


def compiled(name, function, arguments, cotangents):
    """Forward and backward of `function(*arguments)` in one program; the answer: values and gradients."""

    def both(arguments, cotangents):
        values, back = jax.vjp(function, *arguments)
        return *values, *back(cotangents)

    both = jax.jit(both)

    def call(times):
        for _ in range(times):
            jax.block_until_ready(both(arguments, cotangents))

    return {name: call}, both(arguments, cotangents)


def amortised(params, z, gy, gl):
    """A stack whose parameters `(batch, K, 2 D + 1)` differ from row to row of `z`."""
    return compiled(
        "amortised",
        lambda params, z: jax.vmap(lambda params, z: stack(params).transform_and_log_det(z))(params, z),
        (params, z),
        (gy, gl),
    )


def spline(theta, z, gy, gl, bound, inverse):
    """Splines with parameters of their own: widths and heights before the softmax, slopes at all
    knots before the softplus.
    """

    def one(theta, z):
        bins = (theta.shape[-1] - 1) // 3
        law = RationalQuadraticSpline(knots=bins - 1, interval=bound, min_width=2e-3 * bound)
        law = eqx.tree_at(
            lambda law: (law.x_pos.arr, law.y_pos.arr, law.derivatives.args[0]),
            law,
            (theta[:bins], theta[bins : 2 * bins], theta[2 * bins :]),
        )
        law = eqx.tree_at(
            lambda law: (law.x_pos, law.y_pos, law.derivatives),
            law,
            (law.x_pos.unwrap(), law.y_pos.unwrap(), law.derivatives.unwrap()),
        )
        return (law.inverse_and_log_det if inverse else law.transform_and_log_det)(z)

    return compiled("pull" if inverse else "push", jax.vmap(one), (theta, z), (gy, gl))


def dense(x, weight, bias):
    return x @ weight.T + bias


def scanned(head, z, h):
    """Planar layers by `lax.scan`, with all that does not depend on `z` computed outside of it, for
    all layers at once; `head`: the weights of one linear layer for all of them.
    """
    B, D = z.shape
    K = len(head[1]) // (2 * D + 1)
    u, w, b = jnp.split(dense(h, *head), [K * D, 2 * K * D], -1)
    u, w, b = (jnp.moveaxis(t, 1, 0) for t in (u.reshape(B, K, D), w.reshape(B, K, D), b))
    alpha = (u * w).sum(-1)
    slope = jax.nn.softplus(alpha)
    u_hat = u + ((slope - 1 - alpha) / (w * w).sum(-1))[..., None] * w

    def layer(z, part):
        u_hat, w, b = part
        t = jnp.tanh((w * z).sum(-1) + b)
        return z + u_hat * t[:, None], t

    z, t = jax.lax.scan(layer, z, (u_hat, w, b))
    return z, jnp.log(1 + (1 - t * t) * (slope - 1)).sum(0)


def conditional(head, z, h):
    """flowjax's planar layers with a context, as the library has them: each emits its parameters by
    a linear network of its own.
    """
    K = head[0].shape[0]
    dim = z.shape[-1]
    layers = eqx.filter_vmap(lambda key: Planar(key, dim=dim, cond_dim=h.shape[-1], width_size=1, depth=0))(
        jr.split(jr.key(0), K)
    )
    layers = eqx.tree_at(
        lambda layer: (layer.conditioner.layers[0].weight, layer.conditioner.layers[0].bias), layers, head
    )
    return jax.vmap(Scan(layers).transform_and_log_det)(z, h)


def image_energy(parameters, x, noise, stack):
    """The free energy of a batch: encoder of two layers, diagonal Gaussian, `stack`, decoder of
    three layers.
    """
    h = jax.nn.relu(dense(jax.nn.relu(dense(x, *parameters[0:2])), *parameters[2:4]))
    shift, log_scale = jnp.split(dense(h, *parameters[10:12]), 2, -1)
    z = shift + jnp.exp(log_scale) * noise
    log_det = 0.0
    if len(parameters) > 12:
        z, log_det = stack(parameters[12:], z, h)
    logits = dense(
        jax.nn.relu(dense(jax.nn.relu(dense(z, *parameters[4:6])), *parameters[6:8])), *parameters[8:10]
    )
    log_ratio = 0.5 * ((z * z).sum(-1) - (noise * noise).sum(-1)) - log_scale.sum(-1) - log_det
    return (log_ratio - (x * logits).sum(-1) + jax.nn.softplus(logits).sum(-1)).mean()


def image_model(path, name, flow, dynamic):
    """Whole training steps of an image model whose weights, images, batch and noise are in the file
    `path`; values and gradients of that batch go into `path + name`.
    """
    given = np.load(path)
    stack = {"scan": scanned, "flowjax": conditional}[flow]
    optimizer = optax.adam(1e-3)
    parameters = [
        jnp.asarray(given[f"p{i}"], jnp.float32) for i in range(sum(key[0] == "p" for key in given.files))
    ]
    images = jnp.asarray(given["images"])
    batch = len(given["x"])
    value, slopes = jax.value_and_grad(image_energy)(
        parameters, jnp.asarray(given["x"]), jnp.asarray(given["noise"]), stack
    )
    np.savez(
        path + name, value=np.asarray(value), **{f"g{i}": np.asarray(slope) for i, slope in enumerate(slopes)}
    )

    def update(parameters, moments, order, first, key):
        pixels = images[jax.lax.dynamic_slice(order, (first,), (batch,))].astype(jnp.float32)
        bits, noise = jr.split(key)
        x = jr.bernoulli(bits, pixels / 255).astype(jnp.float32) if dynamic else pixels
        value, slopes = jax.value_and_grad(image_energy)(
            parameters, x, jr.normal(noise, (batch, given["noise"].shape[-1])), stack
        )
        moved, moments = optimizer.update(slopes, moments)
        return optax.apply_updates(parameters, moved), moments, value

    update = jax.jit(update, donate_argnums=(0, 1))
    state = {
        "parameters": parameters,
        "moments": optimizer.init(parameters),
        "order": jnp.arange(len(images)),
        "first": len(images),
        "key": jr.key(1),
    }

    def steps(times):
        keys = jr.split(state["key"], times + 2)
        for key in keys[2:]:
            if state["first"] + batch > len(images):
                state["order"] = jr.permutation(keys[1], state["order"])
                state["first"] = 0
            state["parameters"], state["moments"], value = update(
                state["parameters"], state["moments"], state["order"], state["first"], key
            )
            state["first"] += batch
        jax.block_until_ready(value)
        state["key"] = keys[0]

    return {name: steps}, ()


def inverse_autoregressive(dim, context, width, layers, length, batch, bins=0, bound=0.0):
    """Forward and backward of `log q` of an inverse autoregressive flow given contexts (none where
    `context` is 0), as the library builds one: affine, or with splines of that many `bins` on
    `[-bound, bound]`; the answer: its parameters, and the share of the masked weights that live.
    """
    law = RationalQuadraticSpline(knots=bins - 1, interval=bound) if bins else None
    flow = masked_autoregressive_flow(
        jr.key(0),
        base_dist=StandardNormal((dim,)),
        transformer=law,
        cond_dim=context or None,
        flow_layers=length,
        nn_width=width,
        nn_depth=layers,
        invert=False,
    )
    parameters, static = eqx.partition(flow.bijection, eqx.is_inexact_array)
    contexts = jr.normal(jr.key(1), (batch, context)) if context else None

    def energy(parameters, contexts, key):
        z = jr.normal(key, (batch, dim))
        y, log_det = jax.vmap(eqx.combine(parameters, static).transform_and_log_det)(z, contexts)
        return (0.5 * (y * y).sum(-1) - log_det - 0.5 * (z * z).sum(-1)).mean()

    both = jax.jit(jax.value_and_grad(energy, argnums=(0, 1)))
    state = {"key": jr.key(2)}

    def steps(times):
        keys = jr.split(state["key"], times + 1)
        for key in keys[1:]:
            jax.block_until_ready(both(parameters, contexts, key))
        state["key"] = keys[0]

    networks = [part for part in jax.tree.leaves(flow, is_leaf=is_network) if is_network(part)]
    masks = [layer.weight.args[0] for network in networks for layer in network.layers]
    masks = [mask[..., :dim] if mask.shape[-1] == dim + context else mask for mask in masks]
    live = sum(int(mask.sum()) for mask in masks) / sum(mask.size for mask in masks)
    sizes = [p.size for network in networks for p in jax.tree.leaves(network) if eqx.is_inexact_array(p)]
    return {"iaf": steps}, (np.asarray(sum(sizes)), np.asarray(live))


def is_network(part):
    return isinstance(part, eqx.nn.MLP)


known = {
    "iaf": inverse_autoregressive,
    "image model": image_model,
    "fit": fit,
    "amortised": amortised,
    "spline": spline,
}
calls = {}
for line in sys.stdin:
    question = json.loads(line)
    if "build" in question:
        build = known[question.pop("build")]
        made, answer = build(
            **{
                name: jnp.asarray(value, jnp.float32) if isinstance(value, list) else value
                for name, value in question.items()
            }
        )
        calls |= made
        answer = [value.tolist() for value in answer]
    else:
        wall = time.perf_counter()
        cpu = time.process_time()
        calls[question["run"]](question["times"])
        answer = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    print(json.dumps(answer), flush=True)
