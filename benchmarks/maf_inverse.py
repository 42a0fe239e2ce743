"""The slow direction of a masked autoregressive flow: ours against D passes, nflows and zuko.

One thread, one interleaved run.

Ours needs nothing more than `make setup`. The peers go beside, into a folder of their own:

    .venv/bin/python -m pip install --target /tmp/peers --no-deps nflows==0.14 zuko==1.6.0 umnn==1.71 tqdm
    .venv/bin/python benchmarks/maf_inverse.py --peers /tmp/peers

Without `--peers`, or with only one of them in that folder, the others are timed alone. Five blocks,
each one hidden layer of 200 units on D = 784, 16 samples; see `--help` for other sizes. Each
library has its own law and its own starting weights. A round takes several seconds because of the
peers, so there are few; ours take a turn of 20 calls. Agreement: the residual `inverse(forward(z))
- z` of each at its own weights, relative to `1 + |z|`; for ours, also values and log-dets against D
passes in double precision.
"""

import argparse
import sys

import torch
from harness import interleaved, report, torch_only

from normflow_vi.numerics.compiling import has_numba
from normflow_vi.transforms.autoregressive import MaskedAutoregressive
from normflow_vi.transforms.conditioner import run_network

parser = argparse.ArgumentParser(description="time the slow direction of a masked autoregressive flow")
parser.add_argument("--peers", help="folder with nflows and zuko")
for name, default in [("dim", 784), ("width", 200), ("batch", 16), ("blocks", 5), ("rounds", 5)]:
    parser.add_argument(f"--{name}", type=int, default=default)
given = parser.parse_args()
if given.peers:
    sys.path.append(given.peers)

TURN = 20  # calls of ours in a turn: one call is too short to be timed alone
torch.manual_seed(0)
maf = MaskedAutoregressive(given.dim, given.blocks, hidden=(given.width,))
z = torch.randn(given.batch, given.dim)


in_torch = torch_only(lambda model=maf, z=z: model.forward(z))  # the same stages without the kernel


def passes(model=maf, z=z):
    """The oracle: the whole network once for each variable."""
    total = 0.0
    for layer in model.unstacked(model.masked("closed form", model.fetch_tensors(None, z.dtype))):
        x = torch.zeros_like(z)
        for i in layer["sequence"].tolist():
            theta = run_network(x, layer).unflatten(-1, (model.dim, 2))
            moved, log_slope = model.law.push(z, theta)
            x[:, i] = moved[:, i]
        z = x
        total = total + log_slope.sum(-1)
    return z, total


def nflows_model():
    from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, ReversePermutation

    blocks = [
        part
        for _ in range(given.blocks)
        for part in (
            MaskedAffineAutoregressiveTransform(
                given.dim, given.width, num_blocks=0, use_residual_blocks=False
            ),
            ReversePermutation(given.dim),
        )
    ]
    flow = CompositeTransform(blocks).eval()
    return lambda z: flow.inverse(z)[0], lambda x: flow(x)[0]


def zuko_model():
    from zuko.flows import MAF

    transform = MAF(given.dim, transforms=given.blocks, hidden_features=(given.width,)).eval()().transform
    return transform.inv, transform


with torch.no_grad():
    candidates = {
        "ours, kernel": lambda: [maf.forward(z) for _ in range(TURN)],
        "ours, torch": in_torch,
        "D passes": passes,
    }
    residuals = {
        "ours, kernel": maf.inverse(maf.forward(z)[0])[0] - z,
        "ours, torch": maf.inverse(in_torch()[0])[0] - z,
        "D passes": maf.inverse(passes()[0])[0] - z,
    }
    for name, build in [("nflows", nflows_model), ("zuko", zuko_model)]:
        try:
            slow, fast = build()
        except ImportError as missing:
            print(f"without {name}: {missing}")
            continue
        candidates[name] = lambda slow=slow: slow(z)
        residuals[name] = fast(slow(z)) - z
    if not has_numba():
        print("without numba: the kernel is the torch reference")
    found = interleaved(candidates, given.rounds, warmup=1)
    found["ours, kernel"] = tuple(milliseconds / TURN for milliseconds in found["ours, kernel"])
    report(
        f"MAF, {given.blocks} blocks, D = {given.dim}, hidden ({given.width},), batch {given.batch}, "
        "float32, one thread",
        found,
    )
    report("the fast direction, for scale", interleaved({"ours": lambda: maf.inverse(z)}, rounds=15))
    print(
        "agreement, single precision:",
        *(f"{name} {(residual.abs() / (1 + z.abs())).max():.1e}" for name, residual in residuals.items()),
        sep="  ",
    )
    wide = maf.double()
    oracle = passes(maf.double(), z.double())
    gaps = {
        name: max((a - b).abs().max().item() for a, b in zip(found, oracle, strict=True))
        for name, found in [("kernel", wide.forward(z.double())), ("torch", in_torch(wide, z.double()))]
    }
    print(
        "against D passes, double precision, values and log-dets:",
        *(f"{name} {gap:.1e}" for name, gap in gaps.items()),
        sep="  ",
    )
