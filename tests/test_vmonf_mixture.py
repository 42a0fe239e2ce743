"""Mixtures of flows: densities, draws and bounds against what is known of them; plans; wrong arguments."""

import math

import numpy as np
import pytest
import torch
from torch.func import functional_call

from normflow_vi.data.shapes import circles, pinwheel
from normflow_vi.engine.optimizer import Optimizer
from normflow_vi.engine.trainer import Trainer
from normflow_vi.experiments import programs, vmonf_mnist, vmonf_plane
from normflow_vi.flows import CIF, MAF, NSF, Flow, RealNVP
from normflow_vi.models.classifier import Classifier, Standardise
from normflow_vi.models.mixture import MixtureOfFlows
from normflow_vi.models.variational_mixture import VariationalMixture
from normflow_vi.objectives.enumerated import (
    enumerated_elbo,
    falling_temperature,
    inconsistency,
    labelled_bound,
    tempered_responsibilities,
)
from normflow_vi.transforms import Affine, BatchNorm, Inverse, Planar

MAKERS = {
    "realnvp": lambda: RealNVP(2, 4, hidden=(8,)),
    "maf": lambda: MAF(2, 2, hidden=(8,)),
    "nsf": lambda: NSF(2, 2, "coupling", hidden=(8,)),
    "planar": lambda: Planar(2, 4),
}


def stirred(flow):
    "The same flow, its parameters moved a little from where they begin."
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow


def make_mixture(name="realnvp", count=3, **options):
    torch.manual_seed(0)
    return MixtureOfFlows([stirred(Flow(MAKERS[name]())) for _ in range(count)], **options)


def gaussian(mean, scale):
    "A flow that is `N(mean, diag(scale^2))`."
    layer = Affine(len(mean))
    with torch.no_grad():
        layer.source.shift.copy_(torch.tensor(mean)[None])
        layer.source.log_scale.copy_(torch.tensor(scale).log()[None])
    return Flow(layer)


@pytest.mark.parametrize("name", MAKERS)
def test_at_once_is_one_by_one(name):
    p, x = make_mixture(name), torch.randn(50, 2)
    assert p.is_batched
    at_once = p.component_log_probs(x)
    slopes = torch.autograd.grad(at_once.logsumexp(-1).sum(), list(p.parameters()))
    p.is_batched = False
    one_by_one = p.component_log_probs(x)
    assert torch.allclose(at_once, one_by_one, atol=1e-4)
    for a, b in zip(
        slopes, torch.autograd.grad(one_by_one.logsumexp(-1).sum(), list(p.parameters())), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-3 * (1 + b.abs().max()))


def test_components_with_running_statistics_stay_alone():
    flows = [Flow(Inverse(BatchNorm(2))) for _ in range(2)]
    assert not MixtureOfFlows(flows).is_batched


def test_components_of_continuous_index_are_alike_but_random():
    p = MixtureOfFlows([Flow(CIF(2, 1, hidden=(4,))) for _ in range(2)])
    x = torch.zeros(400, 2)
    generator = torch.Generator().manual_seed(0)
    each = p.component_log_probs(x, generator)
    assert each.shape == (400, 2) and (each.std(0) > 0).all()
    again = p.component_log_probs(x, torch.Generator().manual_seed(0))
    assert torch.equal(each, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bound_with_the_responsibilities_is_the_likelihood(dtype):
    p, x = make_mixture().to(dtype), torch.randn(200, 2, dtype=dtype)
    log_joint = p.component_log_probs(x)
    found = enumerated_elbo(log_joint, log_joint.log_softmax(-1))
    assert found.dtype == dtype
    assert (found - p.log_prob(x)).abs().max() < (1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_bound_lies_below_by_the_divergence(seed):
    p, x = make_mixture().double(), torch.randn(100, 2).double()
    generator = torch.Generator().manual_seed(seed)
    log_q = (5 * torch.randn(100, 3, generator=generator).double()).log_softmax(-1)
    log_joint = p.component_log_probs(x)
    gap = (log_q.exp() * (log_q - log_joint.log_softmax(-1))).sum(-1)
    assert (gap >= 0).all()
    assert torch.allclose(enumerated_elbo(log_joint, log_q), p.log_prob(x) - gap, atol=1e-9)


def test_bound_is_finite_where_q_is_sure():
    log_joint, log_q = torch.tensor([-1.0, -2.0]), torch.tensor([0.0, -math.inf]).requires_grad_()
    value = enumerated_elbo(log_joint, log_q)
    (slope,) = torch.autograd.grad(value, log_q)
    assert value == -1.0 and slope.isfinite().all()


def test_entropy_and_divergence_against_sums():
    "Entropy of a mixture, and its divergence from another density, by draws and on a lattice."
    p = MixtureOfFlows(
        [gaussian([-1.0, 0.0], [0.5, 1.0]), gaussian([1.5, 0.5], [1.0, 0.4])], torch.tensor([1.0, 3.0])
    )
    other = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 2.0), 1)
    side = torch.linspace(-9, 9, 601)
    grid, cell = torch.cartesian_prod(side, side), (side[1] - side[0]) ** 2
    with torch.no_grad():
        log_p = p.log_prob(grid).double()
        entropy = -(log_p.exp() * log_p).sum() * cell
        divergence = (log_p.exp() * (log_p - other.log_prob(grid))).sum() * cell
        assert abs(log_p.exp().sum() * cell - 1) < 1e-3
        z = p.sample(40_000, torch.Generator().manual_seed(0))
        drawn = p.log_prob(z)
    for exact, draws in ((entropy, -drawn), (divergence, drawn - other.log_prob(z))):
        assert abs(draws.mean() - exact) < 4 * draws.std() / 200


def test_draws_have_the_shares_and_places_of_the_components():
    weights = torch.tensor([0.2, 0.5, 0.3])
    p = MixtureOfFlows([gaussian([4.0 * k, 0.0], [0.5, 0.5]) for k in range(3)], weights)
    x, k = p.sample_with_components(20_000, torch.Generator().manual_seed(0))
    shares = k.bincount(minlength=3) / len(k)
    assert ((shares - weights).abs() < 4 * (weights * (1 - weights) / len(k)).sqrt()).all()
    assert torch.equal((x[:, 0] / 4).round().long().clamp(0, 2), k)
    same = p.sample(20_000, torch.Generator().manual_seed(0))
    assert torch.equal(same, x)


def test_learned_weights_climb_to_the_shares_of_the_points():
    p = MixtureOfFlows([gaussian([-3.0], [1.0]), gaussian([3.0], [1.0])], learn_weights=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.where(torch.rand(4000, 1, generator=generator) < 0.8, -3.0, 3.0)
    x = x + torch.randn(4000, 1, generator=generator)
    optimizer = torch.optim.Adam([p.logits], 0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (-p.log_prob(x).mean()).backward()
        optimizer.step()
    error = (0.16 / 4000) ** 0.5
    assert abs(p.log_weights.exp()[0].item() - (x < 0).float().mean()) < 4 * error
    assert not MixtureOfFlows([gaussian([0.0], [1.0])]).logits.requires_grad


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: MixtureOfFlows([]), ("components=", "one flow or more")),
        (lambda: MixtureOfFlows([torch.nn.Linear(1, 1)]), ("components[0]", "a Flow")),
        (lambda: MixtureOfFlows([Flow(Affine(2, context_dim=1))]), ("context_dim=1",)),
        (lambda: MixtureOfFlows([Flow(Affine(1)), Flow(Affine(2))]), ("one dimension",)),
        (lambda: MixtureOfFlows([Flow(Affine(1))], torch.tensor([0.0])), ("weights=", "above 0")),
        (lambda: MixtureOfFlows([Flow(Affine(1))], torch.tensor([1.0, 1.0])), ("weights=", "1 finite")),
        (lambda: make_mixture().sample(0), ("count=0",)),
        (lambda: Classifier(2, 0), ("classes=0",)),
        (lambda: Classifier(2, 2)(torch.zeros(2, 2), temperature=0.0), ("temperature=0",)),
        (lambda: VariationalMixture(make_mixture(), Classifier(2, 2)), ("classifier=", "2 classes")),
        (lambda: falling_temperature(1, -1.0), ("rate=-1",)),
        (lambda: falling_temperature(1, floor=0.0), ("floor=0",)),
        (lambda: tempered_responsibilities(torch.zeros(2), math.nan), ("temperature=nan",)),
        (lambda: pinwheel([]), ("counts=",)),
        (lambda: pinwheel([10, 0]), ("counts=0",)),
        (lambda: circles([10, 10], noise=-1.0), ("noise=-1",)),
        (lambda: circles([10], radii=(1.0, 2.0)), ("counts=",)),
    ],
)
def test_what_does_not_fit_is_named(make, words):
    with pytest.raises(ValueError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), caught.value


def test_one_point_one_dimension_one_component():
    p = MixtureOfFlows([gaussian([0.0], [1.0])])
    model = VariationalMixture(p, Classifier(1, 1)).eval()
    found = model.bound(torch.zeros(1, 1))
    assert torch.allclose(found.value, torch.tensor(-0.5 * math.log(2 * math.pi)))


def test_temperature_hardens_without_moving_borders():
    torch.manual_seed(0)
    q, x = Classifier(2, 4).eval(), torch.randn(300, 2)
    soft, sharp = q(x), q(x, 0.05)
    assert torch.equal(soft.argmax(-1), sharp.argmax(-1))
    assert (sharp.exp().amax(-1) >= soft.exp().amax(-1) - 1e-6).all()
    q.temperature.fill_(0.05)
    assert torch.equal(q(x), sharp)


def test_labels_teach_by_both_parts():
    log_joint, log_q = torch.randn(20, 3), torch.randn(20, 3).log_softmax(-1)
    labels = torch.randint(3, (20,))
    rows = torch.arange(20)
    assert torch.equal(labelled_bound(log_joint, log_q, labels), (log_joint + log_q)[rows, labels])


def test_disagreement_is_a_divergence():
    log_q = torch.randn(50, 4).log_softmax(-1).requires_grad_()
    other = torch.randn(50, 4).log_softmax(-1)
    assert (inconsistency(log_q, other) > 0).all()
    assert not inconsistency(log_q, other).requires_grad  # the first argument is held


def make_loss():
    def loss(model, batch, step, generator):
        from types import SimpleNamespace

        return SimpleNamespace(value=-model.bound(batch, falling_temperature(step)).value.mean(), terms={})

    return loss


class Same:
    "The same points at every update."

    def __init__(self, x):
        self.x = x

    def next(self):
        return self.x

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_two_trainings_at_once_are_two_trainings():
    def model(seed):
        torch.manual_seed(seed)
        flows = [Flow(RealNVP(2, 2, hidden=(4,))) for _ in range(2)]
        return VariationalMixture(MixtureOfFlows(flows), Classifier(2, 2, (4,)))

    x = torch.randn(64, 2)

    def train(seeds):
        models = [model(seed) for seed in seeds]
        how = {
            "steps": 20,
            "optimizer": Optimizer("adam", 1e-2),
            "seeds": seeds,
            "batches": [Same(x) for _ in seeds],
        }
        return Trainer(models, make_loss(), **how).run(), models

    _, together = train([0, 1])
    for seed, model_together in enumerate(together):
        _, (alone,) = train([seed])
        tensors = {**dict(alone.named_parameters()), **dict(alone.named_buffers())}
        for name, t in {
            **dict(model_together.named_parameters()),
            **dict(model_together.named_buffers()),
        }.items():
            assert torch.allclose(t, tensors[name], atol=1e-4), name
    means = [part.mean for part in together[0].modules() if isinstance(part, Standardise)]
    assert all(mean.abs().max() > 0 for mean in means)  # running statistics move in one program too


def test_tensors_can_be_exchanged():
    p, x = make_mixture(), torch.randn(5, 2)
    moved = {name: t + 0.1 for name, t in p.named_parameters()}

    class Density(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = p

        def forward(self, x):
            return self.p.log_prob(x)

    changed = functional_call(Density(), {f"p.{name}": t for name, t in moved.items()}, (x,))
    before = p.log_prob(x)
    assert (changed - before).abs().max() > 1e-3 and torch.equal(p.log_prob(x), before)


def test_pinwheel_bent_back_is_gaussian():
    x, wing = pinwheel([20_000] * 5, torch.Generator().manual_seed(0))
    x = 2 * x[wing == 0]
    radius = x.norm(dim=1)
    angle = torch.atan2(x[:, 1], x[:, 0]) - 0.4 * radius.exp()
    along, across = radius * angle.cos(), radius * angle.sin()
    assert abs(along.mean() - 1) < 4 * 0.3 / 20_000**0.5 + 0.005
    assert abs(along.std() - 0.3) < 0.01 and abs(across.std() - 0.05) < 0.02


def test_plans_have_what_they_say():
    assert {len(some) for some in programs(vmonf_plane.experiment, vmonf_plane.plan("quick"))} == {3}
    sizes = {run.model: run.get("updates") for run in vmonf_plane.plan("quick")}
    assert sizes == {"pinwheel": 2000, "circles": 4000, "circles, 16 labels": 4800}
    digits = vmonf_mnist.plan("paper", "digits")
    long = [run for run in digits if run.get("updates") == 25_500]
    assert sum(run.flow == "classifier" for run in long) >= 2
    assert len({run.key for run in digits}) == len(digits)
    assert {run.get("updates") for run in digits} == {25_500, 2_550}


def test_ways_of_learning_digits_are_what_they_say():
    plan = vmonf_mnist.plan("smoke", "digits")
    runs = {run.flow: run for run in plan}
    assert set(runs) == set(vmonf_mnist.WAYS)
    data = vmonf_mnist.dataset(plan[0])
    rows = vmonf_mnist._Rows(vmonf_mnist.first_digits(data.train), 30, 0).next()
    z, labels = rows[:, :-1], rows[:, -1].long()
    model = vmonf_mnist.build(runs["classifier"], data).eval()

    def bound(way, step):
        generator = torch.Generator().manual_seed(0)
        return vmonf_mnist._bound_of(runs[way], model, z, labels, step, generator)

    log_p = bound("likelihood", 0)
    torch.testing.assert_close(
        bound("hardened", 0), log_p
    )  # at temperature one the responsibilities are exact
    assert (bound("hardened", 10**6) <= log_p + 1e-2).all() and (bound("classifier", 0) <= log_p).all()
    assert torch.equal(bound("untempered", 10**6), bound("classifier", 0))
    assert not torch.equal(bound("classifier", 10**6), bound("classifier", 0))
    assert (bound("consistent", 0) <= bound("classifier", 0)).all()
    assert torch.equal(bound("k-means-start", 100), bound("classifier", 100))
    assert not torch.equal(bound("k-means-start", 0), bound("classifier", 0))


def test_all_ten_digits_have_no_strangers():
    run = next(run for run in vmonf_mnist.plan("smoke", "digits") if run.flow == "ten-k-means")
    (record,) = vmonf_mnist.train([run], None, "cpu")
    assert record.arrays["table"].shape == record.arrays["table_q"].shape == (10, 10)
    assert record.arrays["draws"].shape == (10, 10, 784)
    assert "strange_bits" not in record.values


def test_labelled_points_are_not_among_the_others():
    run = next(run for run in vmonf_plane.plan("quick") if run.model.endswith("labels"))
    labelled, labels = vmonf_plane._labelled_points(run)
    x, _ = vmonf_plane.SITUATIONS[run.model].points(run.seed)
    assert labels.bincount().tolist() == [16, 16]
    assert torch.cdist(labelled, x).min() > 0


def test_ring_faults_see_a_bridge_and_a_gap():
    x, _ = circles([4000, 4000], torch.Generator().manual_seed(0))
    good = vmonf_plane.ring_faults(x.numpy())
    bridge = np.stack([np.linspace(0.4, 0.8, 200), np.zeros(200)], 1)
    bridged = vmonf_plane.ring_faults(np.concatenate([x.numpy(), bridge]))
    assert good["astray"] < 0.005 and bridged["astray"] > good["astray"] + 0.005
    angle = np.arctan2(x[:, 1], x[:, 0]).numpy()
    assert vmonf_plane.ring_faults(x.numpy()[abs(angle) > 0.3])["thinnest"] < 0.3 < good["thinnest"]


def test_levels_come_back_and_bits_are_those_of_levels():
    images = torch.randint(256, (3, 50), dtype=torch.uint8)
    z, log_det = vmonf_mnist.to_logits(images, torch.Generator().manual_seed(0))
    assert torch.equal(vmonf_mnist.to_levels(z), images)
    # a density that is uniform over the levels spends eight bits a pixel, whatever the map
    log_p = -log_det - 50 * math.log(256)
    assert torch.allclose(vmonf_mnist.bits_per_pixel(log_p, log_det, 50), torch.tensor(8.0))


def test_a_training_on_the_plane_goes_on_bitwise(tmp_path):
    "Stopped at a checkpoint and begun again by a fresh process, as far as the trainer can tell."
    run = next(run for run in vmonf_plane.plan("smoke") if (run.model, run.flow) == ("pinwheel", "shared"))
    whole = vmonf_plane.trainer([run])
    whole.run()
    first = vmonf_plane.trainer([run], folder=tmp_path)
    for _ in range(2):
        first.advance()
    first.good = first.state()
    first.checkpoints.save(first.step, first.good)
    second = vmonf_plane.trainer([run], folder=tmp_path)
    second.run()
    for name, p in whole.models[0].named_parameters():
        assert torch.equal(p, dict(second.models[0].named_parameters())[name]), name
