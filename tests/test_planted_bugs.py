"""A kit that cannot fail proves nothing: each of these bugs is planted, alone, and the contract's
checks must notice it.
"""

import pytest
import torch

from helpers import CASE, plant
from normflow_vi.numerics import compiling as kernels
from normflow_vi.testing.contract import walk

CHECKS = (
    "reaches",
    "double",
    "saved",
    "rows",
    "axes",
    "slopes",
    "parameter_slopes",
    "single",
    "runs",
    "inverse",
    "log_det",
    "normalised",
)  # quick ones first


# family: what is wrong: (row of the table, the function, a piece of its source, what stands there instead)
BUGS = {
    "planar: the norm instead of its square": (
        "planar",
        "planar.constrain",
        "norm2.clamp(min=TINY)",
        "norm2.sqrt()",
    ),
    "planar: log-det forgets the slope": (
        "planar",
        "planar.log_slope",
        "(1 - h * h) * slope",
        "(1 - h * h) + 0 * slope",
    ),
    "planar: log-det with |h| for h squared": ("planar", "planar.log_slope", "(h * h +", "(h.abs() +"),
    "planar: log-det without gradient": ("planar", "planar.log_slope", ".log()", ".log().detach()"),
    "planar: inverse takes a single step": ("planar", "planar.solve_slope", "range(rounds)", "range(0)"),
    "planar: the root of the inverse without gradient": (
        "planar",
        "planar.solve_slope",
        "return a",
        "return a.detach()",
    ),
    "prelu: log-det adds the slope, not its logarithm": (
        "prelu",
        "prelu.PReLU.push",
        "log_slope.sum(-1)",
        "torch.where(z < 0, log_alpha.exp(), 0.).sum(-1)",
    ),
    "batchnorm: log-det divides by the variance": (
        "batchnorm",
        "batchnorm.BatchNorm.push",
        "log_scale.sum(-1)",
        "(log_scale - .5 * (running_var + self.eps).log()).sum(-1)",
    ),
    "batchnorm: statistics are lost on reload": (
        "batchnorm",
        "base.Transform.__init__",
        "register_buffer(name, value)",
        "register_buffer(name, value, persistent=False)",
    ),
    "permutation: lost on reload": (
        "permutation",
        "base.Transform.__init__",
        "register_buffer(name, value)",
        "register_buffer(name, value, persistent=False)",
    ),
    "orthogonal: lost on reload": (
        "orthogonal",
        "base.Transform.__init__",
        "register_buffer(name, value)",
        "register_buffer(name, value, persistent=False)",
    ),
    "permutation: its order in both directions": (
        "permutation",
        "permutation.Permutation.pull",
        "order.argsort()",
        "order",
    ),
    "orthogonal: stays at single precision": (
        "orthogonal",
        "permutation.Orthogonal.prepare",
        "polish_rotation(q)",
        "q",
    ),
    "plu: log-det without gradient": ("plu", "linear._unpack_triangles", ", log_s\n", ", log_s.detach()\n"),
    "plu: inverse takes the wrong order": ("plu", "linear._pull_plu", "order.argsort()", "order"),
    "householder: the whole diagonal": ("householder", "linear.compact_reflections", "/ 2)", ")"),
    "radial: the factor r is dropped": (
        "radial",
        "radial._stretches",
        "(r + alpha * along) / (r + alpha)",
        "along - (m - alpha) / (r + alpha) ** 2",
    ),
    "radial: the first bracket to the power D": (
        "radial",
        "radial._push_radial",
        "(z.shape[-1] - 1)",
        "z.shape[-1]",
    ),
    "radial: beta is not constrained": (
        "radial",
        "radial._positive_lengths",
        "softplus(m) + _FLOOR",
        "softplus(a) + 3 * b",
    ),
    "radial: log-det without gradient": ("radial", "radial._push_radial", ".sum(-1)", ".sum(-1).detach()"),
    "radial: the other root": (
        "radial",
        "radial._solve_radius",
        "torch.where(x < 0, alpha * t / q, q)",
        "(x - (x * x + 4 * alpha * t).sqrt()) / 2",
    ),
    "radial: a root without the factor 4": ("radial", "radial._solve_radius", "4 * alpha", "alpha"),
    "sylvester: r r_tilde is not constrained": (
        "sylvester",
        "sylvester._constrain_product",
        "r * theta.sigmoid(), r_tilde, theta.exp()",
        "r, r_tilde, 1 + r * r_tilde",
    ),
    "sylvester: log-det with R only": (
        "sylvester",
        "sylvester._constrain_product",
        "theta.exp()",
        "1 + r * theta.sigmoid()",
    ),
    "sylvester: log-det without gradient": (
        "sylvester",
        "sylvester._push_sylvester",
        ".sum((-1, -2))",
        ".sum((-1, -2)).detach()",
    ),
    "sylvester: the inverse starts at the first unit": (
        "sylvester",
        "sylvester.Sylvester.pull",
        "_solve_units(matvec(q.mT, y), r, r_tilde, b, slope)",
        "_solve_units(matvec(q.mT, y).flip(-1), r.flip(-1, -2), r_tilde.flip(-1, -2), "
        "b.flip(-1), slope.flip(-1)).flip(-1)",
    ),
    "sylvester: columns not normalised": (
        "sylvester",
        "sylvester._orthonormal_columns",
        "identity - v.mT @ r[..., :columns]",
        "v[..., :columns, :].mT",
    ),
    "sylvester: R_tilde is lower triangular": (
        "sylvester",
        "sylvester._build_matrices",
        "r_tilde @ q.mT",
        "r_tilde.mT @ q.mT",
    ),
    "coupling: not sorted back": (
        "affine-coupling-bounded",
        "coupling._through_law",
        ".index_select(-1, back)",
        "",
    ),
    "coupling: sorted by the order itself": (
        "affine-coupling-bounded",
        "coupling._through_law",
        "(-1, back)",
        "(-1, order)",
    ),
    "coupling: context ignored": (
        "affine-coupling-bounded",
        "coupling._through_law",
        "layer, context,",
        "layer, None if context is None else 0 * context,",
    ),
    "coupling: network in single precision": (
        "affine-coupling-bounded",
        "coupling._through_law",
        "theta.unflatten(",
        "theta.float().unflatten(",
    ),
    "coupling: conditioned on what moves": (
        "affine-coupling-bounded",
        "coupling._through_law",
        "run_network(z[..., :kept],",
        "run_network(z[..., :kept] + z[..., kept:].mean(-1, keepdim=True),",
    ),
    "coupling: half the log-det": (
        "affine-coupling-bounded",
        "coupling._through_law",
        "log_slopes.sum(-1)",
        ".5 * log_slopes.sum(-1)",
    ),
    "coupling: log-det with the wrong sign": (
        "affine-coupling-bounded",
        "coupling._through_law",
        "log_slopes.sum(-1)",
        "-log_slopes.sum(-1)",
    ),
    "coupling: log-det without gradient": (
        "affine-coupling-bounded",
        "coupling._through_law",
        "log_slopes.sum(-1)",
        "log_slopes.sum(-1).detach()",
    ),
    "coupling: log-det of one row for all": (
        "affine-coupling-bounded",
        "coupling._through_law",
        "log_slopes.sum(-1)",
        "log_slopes.sum(-1).mean().expand(log_slopes.shape[:-1])",
    ),
    "convolution: the highest frequency counted twice": (
        "circular-convolution-even",
        "convolution.all_gains",
        "1 : (n + 1) // 2",
        "1 : n // 2 + 1",
    ),
    "convolution: inner frequencies counted once": (
        "circular-convolution",
        "convolution.all_gains",
        "torch.cat([log_gain, log_gain[..., 1 : (n + 1) // 2]], -1)",
        "log_gain",
    ),
    "convolution: phases lost": (
        "circular-convolution",
        "convolution.convolve",
        "log_gain, turn)",
        "log_gain, 0 * turn)",
    ),
    "convolution: phases of the inverse not negated": (
        "circular-convolution",
        "convolution._Convolution.pull_stack",
        "-tensor for",
        "tensor if name == 'phase' else -tensor for",
    ),
    "convolution: gains mirrored in the wrong order": (
        "circular-convolution",
        "convolution.convolve",
        "irfft(rfft(x) * torch.complex(log_gain, turn).exp(), x.shape[-1])",
        "torch.fft.ifft(torch.fft.fft(x) * all_gains(log_gain, x.shape[-1]).exp()).real",
    ),
    "convolution: length lost in the transform back": (
        "circular-convolution",
        "convolution.convolve",
        "x.shape[-1])",
        "2 * (x.shape[-1] // 2) + 2)[..., :x.shape[-1]]",
    ),
    "convolution: gains without gradient": (
        "circular-convolution",
        "convolution.convolve",
        "log_gain, turn)",
        "log_gain.detach(), turn)",
    ),
    "convolution: cosines in single precision": (
        "symmetric-convolution",
        "convolution._cosine_basis",
        ".to(like.dtype)",
        ".float().to(like.dtype)",
    ),
    "convolution: cosines that are not orthonormal": (
        "symmetric-convolution",
        "convolution._cosine_basis",
        "math.sqrt(1 / n)",
        "math.sqrt(2 / n)",
    ),
    "slog: log-det with the wrong sign": (
        "slog",
        "convolution.SLog.push",
        "y, log_slope.sum",
        "y, -log_slope.sum",
    ),
    "slog: not divided by alpha": ("slog", "convolution.SLog.push", "return y", "return alpha * y"),
    "slog: log-det without gradient": ("slog", "convolution.SLog.push", ".sum(-1)", ".sum(-1).detach()"),
    "conf: the scales left out of the log-det": (
        "convolution-coupling",
        "conf.Convolve.push",
        "log_scale + all_gains",
        "all_gains",
    ),
    "conf: phases of the inverse not negated": (
        "convolution-coupling",
        "conf.Convolve.pull",
        "-log_gain, -phase",
        "-log_gain, phase",
    ),
    "conf: scaled before the filter is undone": (
        "convolution-coupling",
        "conf.Convolve.pull",
        "(-log_scale).exp() * convolve(y - shift,",
        "convolve((-log_scale).exp() * (y - shift),",
    ),
    "spline: wrong derivative": ("spline-coupling", "spline.curve", "2 * s * xi * eta", "s * xi * eta"),
    "spline: slopes at the ends of a bin swapped": (
        "spline-coupling",
        "spline.curve",
        "d1 * xi * xi + 2 * s * xi * eta + d0 * eta * eta",
        "d0 * xi * xi + 2 * s * xi * eta + d1 * eta * eta",
    ),
    "spline: log-slope without gradient": (
        "spline-coupling",
        "spline.curve",
        "bracket.log()",
        "bracket.log().detach()",
    ),
    "spline: the other root": (
        "spline-coupling",
        "spline.uncurve",
        "torch.where(rises, b, -b)",
        "torch.where(rises, -b, b)",
    ),
    "spline: sign of the inverse log-slope": (
        "spline-coupling",
        "spline.rq_spline_inverse",
        "-curve",
        "curve",
    ),
    "spline: the bin before": ("spline-coupling", "spline.ends", "row, 1:-1]", "row, :-2]"),
    "made: a weight without its mask": (
        "iaf",
        "autoregressive.Autoregressive.masks",
        "last.repeat",
        "torch.ones_like(last).repeat",
    ),
    "made: the last inequality not strict": ("iaf", "made.build_masks", "None] < degree", "None] <= degree"),
    "made: hidden units see one variable too many": (
        "maf",
        "made.build_masks",
        "low[..., :, None] <=",
        "low[..., :, None] - 1 <=",
    ),
    "gate: log-det with the wrong sign": ("iaf", "laws.Gate.push", "logsigmoid(s)", "-logsigmoid(s)"),
    "gate: forget and input exchanged": (
        "iaf",
        "laws.Gate.push",
        "torch.sigmoid(s) * z + torch.sigmoid(-s) * m",
        "torch.sigmoid(-s) * z + torch.sigmoid(s) * m",
    ),
    "maf: log-det of one direction with the wrong sign": (
        "maf",
        "laws.ScaleShift.pull",
        "-log_scale.expand_as",
        "log_scale.expand_as",
    ),
    "stages: one ends a unit early": (
        "maf",
        "stagewise.stage_edges",
        "sum(degree <= stage for degree in layer)",
        "max(sum(degree <= stage for degree in layer) - (stage < met[-1]), 0)",
    ),
    "stages: the reversed order is forgotten": (
        "maf",
        "stagewise.stagewise",
        "edges, sequence, context, activation, residual)",
        "edges, sequence.sort().values, context, activation, residual)",
    ),
    "stages: the context is forgotten": (
        "iaf",
        "stagewise.stagewise",
        "sequence, context, activation, residual)",
        "sequence, None if context is None else 0 * context, activation, residual)",
    ),
    "stages: the activation is forgotten": (
        "maf",
        "stagewise.stagewise",
        "context, activation, residual)",
        "context, 'relu', residual)",
    ),
    "stages: no gradient": ("maf", "stagewise.stagewise_torch", "-1).sum(-1)", "-1).sum(-1).detach()"),
    "indexed: sum of s missing": (
        "indexed, given u",
        "continuously_indexed.push_indexed",
        "log_det + s.sum(-1)",
        "log_det",
    ),
    "indexed: t outside the scale": (
        "indexed before, given u",
        "continuously_indexed.push_indexed",
        "s.exp() * (w + t)",
        "s.exp() * w + t",
    ),
    "indexed: t before the inverse scale": (
        "indexed, given u",
        "continuously_indexed.pull_indexed",
        "(z - t) * (-s).exp()",
        "z * (-s).exp() - t",
    ),
    "indexed: u from r in place of q": (
        "indexed, frozen noise",
        "continuously_indexed.ContinuouslyIndexed.forward",
        'self.draw_index("q_"',
        'self.draw_index("r_"',
    ),
    "indexed: no gradient through u": (
        "indexed, frozen noise",
        "continuously_indexed._IndexNetwork.draw",
        "return mean + log_std.exp() * eps",
        "return (mean + log_std.exp() * eps).detach()",
    ),
}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 5))])
@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug, seed, monkeypatch):
    row, *edit = BUGS[bug]
    monkeypatch.setattr(
        kernels, "has_numba", lambda: False
    )  # the bugs are in the reference; tests/test_kernels.py has those of the kernels
    plant(monkeypatch, *edit)
    torch.manual_seed(seed)
    with pytest.raises(AssertionError):
        walk(CASE[row], CHECKS)
