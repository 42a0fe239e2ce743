"""The importance-weighted likelihood with 5,000 draws for each image, 40 latents, decoder
400-400-784.

One thread on one core, one interleaved run; no peers to install.

    .venv/bin/python benchmarks/iwae.py

Ours is `evaluate.log_marginal`, with all that it returns. Beside it, in plain torch: a loop over
the draws of one image, of which `--timed` are timed, and the time is scaled; the usual code,
`--chunk` draws of one image at a time; and a loop over draws that takes one for each of a hundred
images at once. Plain torch encodes an image once; its planar layers run one by one. `+ switch`:
every product of the process sent to oneDNN by torch's global switch.

The pixels are random bits, and the model has been trained on them for 200 updates, so that its
weights are not those of a few draws. Agreement, before anything is timed: log-weights of the same
draws in double precision, and the estimates of ours and of the usual code, which draw differently,
by their z-scores.
"""

import copy
import math

import torch
from harness import Took, arguments, interleaved, onednn_everywhere, parts_of, report, torch_products
from models import ADAM, BITS, Batches, Trainer, image_loss, naive_model, paper_model, weights_of

from normflow_vi.evaluate import log_marginal

given = arguments(
    "time importance-weighted likelihoods",
    samples=5000,
    images=10,
    timed=100,
    chunk=100,
    updates=200,
    rounds=15,
    length=-1,
)
D = 40
X = BITS.pixels(indices=slice(100))


def scaled(call, factor):
    """A candidate that does only a part of the work: `factor` times its time is that of the whole."""

    def turn():
        found = interleaved({"": call}, 1, 0)[""]
        return Took(*(1e-3 * factor * ms for ms in found))

    return turn


@torch.no_grad()
def chunked(plain, x, draws, chunk):
    """Log-weights of `draws` draws for each row of `x`, `chunk` at a time, `(draws, rows)`."""
    encoded = plain.encode(x)
    return torch.cat(
        [plain.log_weights(x, torch.randn(chunk, len(x), D), encoded) for _ in range(draws // chunk)]
    )


def agree(model, plain):
    """The same draws have the same log-weights, and the estimates differ as estimates do."""
    wide = copy.deepcopy(model).double()
    x = X[: given.images].double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        z, log_q = wide.q(x).rsample_and_log_prob((7,), generator)
        found = sum(wide.log_joint(x, z).values()) - log_q
        noise = torch.randn(7, len(x), D, dtype=torch.float64, generator=generator.manual_seed(1))
        error = (found - naive_model(weights_of(wide)).log_weights(x, noise)).abs().max().item()
    torch.manual_seed(2)
    log_w = chunked(plain, X[: given.images], given.samples, given.chunk).double()
    relative = (log_w - log_w.logsumexp(0) + math.log(given.samples)).exp()
    se = relative.std(0) * math.sqrt(2 / given.samples)
    z = (
        log_marginal(model.log_joint, model.q, X[: given.images], given.samples).log_p.double()
        - log_w.logsumexp(0)
        + math.log(given.samples)
    ) / se
    print(
        f"  log-weights of the same draws differ by at most {error:.1e} nats; "
        f"z-scores of {given.images} estimates: mean {z.mean():+.2f}, largest {z.abs().max():.2f} "
        f"(standard errors {se.min():.3f} to {se.max():.3f} nats)"
    )
    if not (error < 1e-9 and z.abs().max() < 5):
        raise AssertionError("ours and the usual code differ")


def compare(K):
    """One interleaved run, milliseconds an image."""
    model = paper_model(K)
    S = given.samples
    Trainer(
        [model], image_loss, steps=given.updates, optimizer=ADAM, seeds=[0], batches=[Batches(BITS, 100, 0)]
    ).run()
    model.eval()
    plain = naive_model(weights_of(model))
    agree(model, plain)

    def ours():
        log_marginal(model.log_joint, model.q, X[: given.images], S)

    def usual():
        chunked(plain, X[:1], S, given.chunk)

    candidates = {
        "ours": scaled(ours, 1 / given.images),
        "ours, torch's products": scaled(torch_products(ours), 1 / given.images),
        "loop over draws": scaled(lambda: chunked(plain, X[:1], given.timed, 1), S / given.timed),
        f"chunks of {given.chunk}": usual,
        f"chunks of {given.chunk} + switch": onednn_everywhere(usual),
        "loop over draws, 100 images at once": scaled(
            lambda: chunked(plain, X, given.timed, 1), S / given.timed / 100
        ),
    }
    found = interleaved(candidates, given.rounds)
    report(
        f"{f'planar K = {K}' if K else 'diagonal posterior'}, {S} draws an image, milliseconds an image",
        found,
    )
    for mine in list(found)[:2]:
        parts_of(found, mine, list(found)[2:])


for K in (0, 80) if given.length < 0 else (given.length,):
    compare(K)
