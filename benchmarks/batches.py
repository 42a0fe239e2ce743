"""One binarised batch of 100 images of 784 pixels: what it costs to draw it.

    .venv/bin/python benchmarks/batches.py

One thread on one core, one interleaved run; no peers to install. 50,000 images of MNIST's shape,
four pixels in five black, the others of random grey. Each candidate draws shuffled batches
without replacement and turns a pixel on with its grey as probability. Agreement: over 200,000
copies of one image, the z-scores of the shares of ones among its grey pixels have mean 0 and
standard deviation 1; its black pixels stay 0, its white ones 1.
"""

import torch
from harness import arguments, interleaved, parts_of, report
from torch.utils.data import DataLoader, TensorDataset

from normflow_vi.data import Batches, Split

given = arguments("time batch preparation", images=50_000, batch=100, rounds=15)
TURN = 50
generator = torch.Generator().manual_seed(0)
grey = torch.randint(256, (given.images, 784), dtype=torch.uint8, generator=generator)
images = grey * (torch.rand(given.images, 784, generator=generator) < 0.2)


def ours(images):
    """Resident bytes, as the experiments draw them."""
    return Batches(Split(images, None, "dynamic"), given.batch, 0).next


def indexed(images):
    """Resident bytes: index, scale, `torch.bernoulli`."""
    state = {"order": torch.empty(0, dtype=torch.int64)}

    def draw():
        if len(state["order"]) < given.batch:
            state["order"] = torch.randperm(len(images))
        rows = state["order"][: given.batch]
        state["order"] = state["order"][given.batch :]
        return torch.bernoulli(images[rows].float() / 255)

    return draw


def loader(images):
    """`TensorDataset` and `DataLoader` in the same process, over images in [0, 1], then `torch.bernoulli`."""
    batches = DataLoader(
        TensorDataset(images.float() / 255), batch_size=given.batch, shuffle=True, drop_last=True
    )
    state = {"left": iter(())}

    def draw():
        found = next(state["left"], None)
        if found is None:
            state["left"] = iter(batches)
            found = next(state["left"])
        return torch.bernoulli(found[0])

    return draw


def standardised(make, draws=2000):
    """Mean, standard deviation and number of the z-scores of grey pixels, over copies of one image."""
    draw = make(images[:1].repeat(given.batch, 1))
    p = images[0].double() / 255
    total = torch.zeros(784, dtype=torch.float64)
    for _ in range(draws):
        x = draw()
        assert x.dtype == torch.float32
        assert x.shape == (given.batch, 784)
        assert ((x == 0) | (x == 1)).all()
        total += x.double().sum(0)
    n = draws * given.batch
    inside = (p > 0) & (p < 1)
    assert (total[p == 0] == 0).all()
    assert (total[p == 1] == n).all()
    score = (total - n * p)[inside] / (n * p * (1 - p))[inside].sqrt()
    return score.mean().item(), score.std().item(), len(score)


makers = {"ours": ours, "index, torch.bernoulli": indexed, "TensorDataset, DataLoader": loader}
draws = {name: make(images) for name, make in makers.items()}
found = interleaved(
    {name: (lambda draw=draw: [draw() for _ in range(TURN)]) for name, draw in draws.items()}, given.rounds
)
report(f"one binarised batch of {given.batch} x 784", found, per=TURN)
parts_of(found, "ours", [name for name in found if name != "ours"])
for name, make in makers.items():
    mean, sd, pixels = standardised(make)
    bound = 3 / pixels**0.5
    print(
        f"  {name:<34} z-scores of {pixels} pixels: mean {mean:+.2f} "
        f"(expected within 3/sqrt({pixels}) = {bound:.2f}), standard deviation {sd:.2f}"
    )
