"""Three seeds of one shape: one batched program, or one-thread processes side by side?"""
import os

from models import energy_trainer, image_trainer
from normflow_vi.training import choose_engine

cores = len(os.sched_getaffinity(0))
for title, make in [("planar K = 2 on U1", lambda seeds: energy_trainer(2, seeds)), ("planar K = 8 on U1", lambda seeds: energy_trainer(8, seeds)),
                    ("planar K = 32 on U1", lambda seeds: energy_trainer(32, seeds)), ("DLGM, diagonal", lambda seeds: image_trainer(0, seeds)),
                    ("DLGM, planar K = 10", lambda seeds: image_trainer(10, seeds))]:
    choice = choose_engine(make, range(3), processes=cores, steps=31)
    print(f"{title:<22} batched {choice.batched:8.1f} updates/s   {cores} processes {choice.processes:8.1f} updates/s   -> {choice.name}, "
          f"{max(choice.batched, choice.processes) / min(choice.batched, choice.processes):.2f} times faster")
