"""The models that the scripts time: the DLGM on random bits of MNIST's shape, and a planar flow on U1."""
import torch

from normflow_vi.data import Batches, Split
from normflow_vi.experiments import energies
from normflow_vi.fitting import density_loss
from normflow_vi.objectives import free_energy
from normflow_vi.targets import U1
from normflow_vi.training import Optimizer, Trainer
from normflow_vi.vae import dlgm

BITS = Split((torch.rand(5000, 784, generator=torch.Generator().manual_seed(0)) < .13).to(torch.uint8), None, "static")
ADAM = Optimizer("adam", 1e-3, schedule="constant")


def image_loss(model, x, step, generator):
    return free_energy(lambda z: model.log_joint(x, z), model.q(x), anneal="kl", generator=generator)


def image_model(length, seed=0):
    torch.manual_seed(seed)
    return dlgm(torch.full((784,), .13), length)


def image_trainer(length, seeds, steps=10**6):
    return Trainer([image_model(length, seed) for seed in seeds], image_loss, steps=steps, optimizer=ADAM, seeds=list(seeds),
                   batches=[Batches(BITS, 100, seed) for seed in seeds], log_every=100)


def energy_trainer(length, seeds, samples=512, steps=10**6):
    return Trainer([energies.build(length, seed) for seed in seeds], density_loss(U1.log_density, samples), steps=steps, optimizer=ADAM, seeds=list(seeds), log_every=100)
