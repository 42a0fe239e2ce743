"""Convolutions beyond the walked contract: explicit matrices in extended precision, ends, gates,
many draws.
"""

from functools import partial

import mpmath
import numpy as np
import pytest
import torch
from torch.func import jacrev, vmap

from helpers import dtypes, emitting, exact, many_draws, moved, near, normals, over_draws, scales, tensors_of
from normflow_vi.transforms import Affine, Chain
from normflow_vi.transforms.conf import ConvolutionCoupling, Convolve
from normflow_vi.transforms.convolution import (
    CircularConvolution,
    SLog,
    SymmetricConvolution,
    _cosine_basis,
    all_gains,
    convolve,
)

DOUBLE = torch.zeros((), dtype=torch.float64)
KINDS = (CircularConvolution, SymmetricConvolution, SLog)
sizes = pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 40, 63, 64])


def randomised(transform, scale=1.0):
    return moved(transform, scale, jitter=1.0)


# Explicit matrices


def filter_with_numpy(log_gain, phase, n):
    "The real filter, from the sum over all `n` frequencies; fails if it is not real."
    spectrum = np.zeros(n, dtype=complex)
    spectrum[: n // 2 + 1] = np.exp(log_gain + 1j * np.pad(phase, (1, n // 2 - len(phase))))
    for k in range(n // 2 + 1, n):
        spectrum[k] = spectrum[n - k].conj()
    w = spectrum @ np.exp(2j * np.pi * np.outer(range(n), range(n)) / n) / n
    assert np.abs(np.imag(w)).max() < 1e-12 * np.abs(w).max()
    return np.real(w)


def circulant(w):
    "The matrix of a filter on a ring."
    n = len(w)
    return [[w[(i - m) % n] for m in range(n)] for i in range(n)]


@sizes
def test_circular_layer_is_its_matrix(n):
    "`y_i = sum_n x_n w_{(i-n) mod N}`, inverse and determinant included."
    layer = randomised(CircularConvolution(n))
    x = normals(20, n)
    log_gain = layer.source.log_gain[0].detach().numpy()
    phase = layer.source.phase[0].detach().numpy()
    matrix = np.array(circulant(filter_with_numpy(log_gain, phase, n)))
    y, log_det = layer.forward(x)
    assert np.allclose(y.detach(), x.numpy() @ matrix.T, atol=1e-12 * n)
    sign, expected = np.linalg.slogdet(matrix)
    assert sign == 1
    assert np.allclose(log_det.detach(), expected, rtol=0, atol=1e-10)
    back, minus = layer.inverse(y)
    assert torch.allclose(back, x, atol=1e-9)
    assert torch.equal(minus, -log_det)


@sizes
def test_symmetric_layer_is_its_matrix(n):
    layer = randomised(SymmetricConvolution(n))
    x = normals(20, n)
    k, i = np.mgrid[:n, :n]
    length = np.where(k == 0, np.sqrt(1 / n), np.sqrt(2 / n))
    basis = length * np.cos(np.pi * k * (2 * i + 1) / (2 * n))
    matrix = basis.T @ np.diag(layer.source.log_gain[0].exp().detach()) @ basis
    y, log_det = layer.forward(x)
    assert np.allclose(basis @ basis.T, np.eye(n), atol=1e-12)
    assert np.allclose(y.detach(), x.numpy() @ matrix.T, atol=1e-11)
    assert np.allclose(log_det.detach(), np.linalg.slogdet(matrix)[1], rtol=0, atol=1e-10)
    assert np.linalg.eigvalsh(matrix).min() > 0
    assert torch.allclose(layer.inverse(y)[0], x, atol=1e-9)


def determinant(rows):
    "log|det| with as many digits as the spread of the spectrum asks for."
    return mpmath.log(abs(mpmath.det(mpmath.matrix(rows))))


def ring(a, phi, n):
    "The circulant matrix of the filter with the log-gains `a` and the phases `phi`."
    spectrum = [mpmath.mpf(0)] * n
    for k in range(n // 2 + 1):
        angle = phi[k - 1] if 0 < k <= len(phi) else 0
        spectrum[k] = mpmath.exp(a[k] + mpmath.j * angle)
    for k in range(n // 2 + 1, n):
        spectrum[k] = mpmath.conj(spectrum[n - k])
    w = []
    for i in range(n):
        waves = [mpmath.expjpi(mpmath.mpf(2 * k * i) / n) for k in range(n)]
        w.append(mpmath.re(mpmath.fdot(spectrum, waves)) / n)
    return circulant(w)


def mirrored(a, n):
    "The matrix of the symmetric convolution with the log-gains `a`."
    gains = mpmath.diag([mpmath.exp(v) for v in a])
    basis = mpmath.matrix(n, n)
    for k in range(n):
        length = mpmath.sqrt(mpmath.mpf(1 if k == 0 else 2) / n)
        for i in range(n):
            basis[k, i] = length * mpmath.cospi(mpmath.mpf(k * (2 * i + 1)) / (2 * n))
    return basis.T * gains * basis


@pytest.mark.parametrize("scale, digits", [(1.0, 50), (10.0, 150), (100.0, 1500)])
@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_determinants_in_extended_precision(n, scale, digits):
    for _ in range(3):
        circular = randomised(CircularConvolution(n), scale)
        symmetric = randomised(SymmetricConvolution(n), scale)
        x = normals(n)
        with mpmath.workdps(digits):
            log_gain = exact(circular.source.log_gain[0])
            phase = exact(circular.source.phase[0])
            expected = determinant(ring(log_gain, phase, n))
            assert near(circular.forward(x)[1], expected)
            log_gain = exact(symmetric.source.log_gain[0])
            expected = determinant(mirrored(log_gain, n))
            assert near(symmetric.forward(x)[1], expected)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 5e-7), (torch.float64, 1e-13)])
def test_cosine_basis_is_orthogonal_to_working_precision(dtype, atol):
    "The product is taken in double precision: how far a machine's own product rounds is not asked here."
    for n in (1, 2, 40, 784):
        basis = _cosine_basis(n, torch.zeros((), dtype=dtype))
        assert basis.dtype == dtype
        product = basis.double() @ basis.double().T
        assert (product - torch.eye(n)).abs().max() <= atol
    layer = SymmetricConvolution(40)
    matrix = jacrev(lambda z: layer.forward(z)[0])(torch.randn(40, dtype=dtype)).detach()
    assert matrix.dtype == dtype
    assert (matrix - torch.eye(40)).abs().max() <= atol


# What the layers are for


@pytest.mark.parametrize("n", [2, 5, 6])
def test_every_filter_with_positive_sums_is_reached(n):
    """Positive at frequency zero and, for even `n`, at the highest one; the map back is the
    logarithm of the spectrum.
    """
    for _ in range(20):
        w = normals(n)
        lacking = (-w.sum()).clamp(min=0)
        w = w + 1e-3 + lacking / n * 1.1
        if n % 2 == 0:
            wave = 1 - 2 * (torch.arange(n) % 2).double()
            lacking = (-(w * wave).sum()).clamp(min=0)
            w = w + wave * (1e-3 + lacking / n * 1.1)
        spectrum = torch.fft.rfft(w)
        log_gain = spectrum.abs().log()
        phase = spectrum.angle()[1 : (n + 1) // 2]
        impulse = torch.eye(n, dtype=torch.float64)[0]
        found = convolve(impulse, log_gain, phase)
        assert torch.allclose(found, w, atol=1e-10)


def test_a_ring_has_no_beginning():
    layer = randomised(CircularConvolution(9, 2))
    x = normals(5, 9)
    y, log_det = layer.forward(x)
    turned, same = layer.forward(x.roll(4, -1))
    assert torch.allclose(turned, y.roll(4, -1))
    assert torch.equal(same, log_det)


@pytest.mark.parametrize("n", [2, 3, 8, 9])
def test_mirrors(n):
    """A symmetric convolution is an even filter along the reflected signal, and commutes with
    reading backwards.
    """
    layer = randomised(SymmetricConvolution(n))
    x = normals(5, n)
    s = layer.source.log_gain[0].exp().detach()
    even = []
    for m in range(2 * n):
        waves = torch.cos(torch.pi * torch.arange(1, n).double() * m / n)
        even.append((s[0] + 2 * (s[1:] * waves).sum()) / (2 * n))
    reflected = torch.cat([x, x.flip(-1)], -1)
    matrix = torch.tensor(circulant(even), dtype=torch.float64)
    expected = (reflected @ matrix.T)[:, :n]
    y = layer.forward(x)[0]
    assert torch.allclose(y, expected)
    assert torch.allclose(layer.forward(x.flip(-1))[0], y.flip(-1))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_stack_is_the_composition_of_its_layers(kind):
    stack = randomised(kind(7, 3, max_log_scale=2.0))
    x = normals(5, 7)
    y, total = x, 0
    for k in range(3):
        one = kind(7, max_log_scale=2.0).double()
        with torch.no_grad():
            for name, tensor in stack.source().items():
                one.source()[name].copy_(tensor[k : k + 1])
        y, log_det = one.forward(y)
        total = total + log_det
    assert torch.allclose(stack.forward(x)[0], y)
    assert torch.allclose(stack.forward(x)[1], total)


def test_multiplication_and_convolution():
    "`y = w (*) (d . x) + t`: log-dets of both add."
    layers = randomised(Chain(Affine(6), CircularConvolution(6)))
    x = normals(5, 6)
    d = layers.transforms[0].source.log_scale[0].exp()
    log_gain, phase = (p[0] for p in layers.transforms[1].parameters())
    y, log_det = layers.forward(x)
    shift, _ = layers.forward(0 * x)
    assert torch.allclose(y - shift, convolve(d * x, log_gain, phase))
    assert torch.allclose(log_det, all_gains(log_gain, 6).sum() + d.log().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_identity_at_the_start(kind):
    x = torch.randn(50, 6)
    options = {"alpha": 1e-12} if kind is SLog else {}
    y, log_det = kind(6, 2, **options).forward(x)
    assert torch.allclose(y, x, atol=1e-6)
    assert torch.allclose(log_det, torch.zeros(50), atol=1e-6)


def test_what_is_refused():
    for make in (CircularConvolution, SymmetricConvolution, SLog, ConvolutionCoupling):
        for bad in (0, -1.0, float("inf"), "2"):
            with pytest.raises(ValueError, match="max_log_scale"):
                make(4, max_log_scale=bad)
    for bad in (0, -0.1, float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match="alpha"):
            SLog(4, alpha=bad)


# The gate


@scales
def test_gate_in_extended_precision(scale):
    "Values, slopes and inverse from 1e-300 to 1e6; for `alpha` down to e^-250 and up to e^250."
    gate = randomised(SLog(40, alpha=1.0), scale)
    sizes = 10 ** torch.linspace(-300, 6, 40, dtype=torch.float64)
    x = normals(40).sign() * sizes
    x[0] = 0
    y, log_det = gate.forward(x)
    with mpmath.workdps(400):
        terms = []
        log_ratio = gate.source.log_ratio[0]
        for xi, yi, r in zip(exact(x), exact(y), exact(log_ratio), strict=True):
            alpha = mpmath.exp(r)
            terms.append(mpmath.log(1 + alpha * abs(xi)))
            expected = mpmath.sign(xi) * terms[-1] / alpha
            if abs(expected) * min(alpha, 1) > 1e-300:
                allowed = 1e-12 * abs(expected) * (1 + abs(r))
                assert abs(yi - expected) <= allowed  # beyond, numbers lose digits
        assert near(log_det, -mpmath.fsum(terms))
    back, minus = gate.inverse(y)
    assert torch.allclose(gate.forward(back)[0], y, rtol=1e-10, atol=0)
    assert torch.allclose(minus, -log_det, rtol=1e-10)


def test_gate_at_zero_and_far_out():
    gate = SLog(1, alpha=0.5).double()
    for value in (0.0, -0.0, 1e-300, 1e6, -1e6, 1e300):
        x = torch.tensor([value], dtype=torch.float64)
        (slope,) = jacrev(lambda x: gate.forward(x)[0])(x)
        assert slope.isfinite()
        assert torch.allclose(slope.log(), gate.forward(x)[1].detach(), atol=1e-12)
        assert jacrev(lambda x: gate.inverse(x)[0])(x / (1 + x.abs())).isfinite().all()
    x = torch.linspace(-50, 50, 1001)[:, None].double()
    assert (gate.forward(x)[0].diff(dim=0) > 0).all()
    assert torch.equal(gate.forward(-x)[0], -gate.forward(x)[0])


# The data-adaptive coupling


@pytest.mark.parametrize("n", [1, 2, 5, 6])
@pytest.mark.parametrize("scale, digits", [(1.0, 50), (10.0, 150), (100.0, 1500)])
def test_adaptive_filter_in_extended_precision(n, scale, digits):
    "The determinant of `circulant(w) diag(d)` for `w`, `d` from the law's parameters."
    theta = scale * normals(n, 3)
    _, log_slopes = Convolve().push(normals(n), theta)
    with mpmath.workdps(digits):
        log_d = exact(theta[:, 1])
        packed = exact(theta[:, 2])
        filter_ = mpmath.matrix(ring(packed[: n // 2 + 1], packed[n // 2 + 1 :], n))
        d = mpmath.diag([mpmath.exp(v) for v in log_d])
        expected = determinant(filter_ * d)
        assert near(log_slopes.sum(), expected)


def test_adaptive_coupling_keeps_convolves_and_adapts():
    conf = randomised(ConvolutionCoupling(10, hidden=(6,), activation="tanh", mask="checkerboard"), 0.5)
    z = normals(10)
    jacobian = jacrev(lambda z: conf.forward(z)[0])
    at = jacobian(z).detach()
    elsewhere = jacobian(z + torch.arange(10) % 2).detach()
    kept = torch.arange(1, 10, 2)
    moved = torch.arange(0, 10, 2)
    assert torch.equal(at[kept], torch.eye(10, dtype=torch.float64)[kept])
    for matrix in (at, elsewhere):
        block = matrix[moved][:, moved]
        block = block / block.sum(0)  # the sum of a filter is the same in every column
        assert (block.diagonal() != block[0, 1]).all()
        for k in range(5):
            assert torch.allclose(block[:, k].roll(-k), block[:, 0])
    assert not torch.allclose(at[moved][:, moved], elsewhere[moved][:, moved], atol=1e-3)


# Many draws


@many_draws
@dtypes
@scales
@pytest.mark.parametrize("kind", KINDS)
def test_many_draws(kind, draws, dtype, scale):
    """Finite values and log-dets, both directions, and positive determinants: log-scales cut at
    +-5, and free ones within `max_log_scale`.
    """
    x = torch.randn(draws, 6, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    for limit in (None, 5.0):
        make = partial(kind, 6, 1, max_log_scale=limit)
        transform, context = emitting(make, draws, scale, dtype)
        if limit is None:
            context = context.clamp(-5, 5)
        y, log_det = transform.forward(x, context)
        back, minus = transform.inverse(y, context)
        for t in (y, log_det, back, minus):
            assert t.isfinite().all()
        assert (log_det.abs() <= 6 * 5 * (1 + 1e-5) + (kind is SLog) * 1e3).all()
        if kind is SLog:
            continue  # elementwise and increasing
        jacobian = vmap(jacrev(lambda x, c, forward=transform.forward: forward(x, c)[0]))
        matrices = jacobian(x[:500].double(), context[:500].double())
        sign, expected = torch.linalg.slogdet(matrices)
        assert (sign == 1).all()
        assert torch.allclose(log_det[:500].double(), expected, rtol=tolerance, atol=tolerance)


@many_draws
@dtypes
@scales
def test_many_draws_of_adaptive_couplings(draws, dtype, scale):
    "Networks of their own in every draw; the filter's and the scales' logarithms within +-5."
    conf = ConvolutionCoupling(5, 2, hidden=(6,), activation="tanh", max_log_scale=5.0).to(dtype)
    tensors = tensors_of(conf, draws, scale, dtype)
    y, log_det = over_draws(conf, tensors, torch.randn(draws, 5, dtype=dtype))
    assert y.isfinite().all()
    assert log_det.isfinite().all()
    assert (log_det.abs() <= 2 * 2 * 3 * 5 * (1 + 1e-5)).all()
    assert log_det.std() > 1
