"""What the training engine costs over a bare loop of the same calls."""

import torch
from harness import interleaved, report
from models import ADAM, BITS, U1, Batches, Trainer, density_loss, energies, image_loss, image_model

UPDATES = 100


def engine(build, loss, stream):
    """A hundred updates of the engine, log point included."""

    def call():
        trainer = Trainer(
            [build()],
            loss,
            steps=UPDATES,
            optimizer=ADAM,
            seeds=[0],
            batches=stream and [stream()],
            log_every=UPDATES,
        )
        trainer.run()

    return call


def bare(build, loss, stream):
    """The same hundred updates, with nothing around them."""

    def call():
        model = build()
        batches = stream and stream()
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        for step in range(UPDATES):
            estimate = loss(model, batches and batches.next(), step, generator)
            estimate.value.backward()
            optimizer.step()
            optimizer.zero_grad()

    return call


for title, build, loss, stream in [
    (
        "DLGM 784-400-400, diagonal posterior, batch 100",
        lambda: image_model(0),
        image_loss,
        lambda: Batches(BITS, 100, 0),
    ),
    (
        "DLGM 784-400-400, planar K = 10, batch 100",
        lambda: image_model(10),
        image_loss,
        lambda: Batches(BITS, 100, 0),
    ),
    ("planar K = 8 on U1, 512 draws", lambda: energies.build(8, 0), density_loss(U1.log_density, 512), None),
]:
    report(
        title,
        interleaved(
            {"bare loop": bare(build, loss, stream), "engine": engine(build, loss, stream)},
            rounds=7,
            warmup=1,
        ),
        per=UPDATES,
    )
