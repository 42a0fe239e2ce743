"""Several runs of one shape: one batched program, or one-thread processes side by side? Three seeds
of each model, and the twelve restarts of a fit.
"""

import os

from models import energy_trainer, image_trainer

from normflow_vi.engine.choosing import choose_engine

cores = len(os.sched_getaffinity(0))
for title, runs, make in [
    ("planar K = 2 on U1", 3, lambda seeds: energy_trainer(2, seeds)),
    ("planar K = 8 on U1", 3, lambda seeds: energy_trainer(8, seeds)),
    ("planar K = 32 on U1", 3, lambda seeds: energy_trainer(32, seeds)),
    ("planar K = 32, 256 draws, 12 runs", 12, lambda seeds: energy_trainer(32, seeds, 256)),
    ("DLGM, diagonal", 3, lambda seeds: image_trainer(0, seeds)),
    ("DLGM, planar K = 10", 3, lambda seeds: image_trainer(10, seeds)),
]:
    choice = choose_engine(make, range(runs), processes=cores, steps=31)
    slower, faster = sorted([choice.batched, choice.processes])
    print(
        f"{title:<34} batched {choice.batched:8.1f} updates/s   "
        f"{cores} processes {choice.processes:8.1f} updates/s   "
        f"-> {choice.name}, {faster / slower:.2f} times faster"
    )
