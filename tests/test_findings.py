"""Conclusions of the pages: each sentence holds its values, and both sides of every condition are said."""

import math

import numpy as np
import pytest

from normflow_vi.experiments import energies, vae_cifar, vae_convolution, vae_evaluation, vae_mnist
from normflow_vi.experiments import vae_posteriors as posteriors
from normflow_vi.experiments.findings import SMOKE, Finding, write_findings
from normflow_vi.results.store import Record, Run


def made_up(values, arrays=None, flow="planar", length=0, seed=0, model="DLGM", profile="quick", **budget):
    "A record without a training: `values` without errors, except where a pair of value and error is given."
    budget = {"updates": 10_000, "evaluation_images": 1000, "samples": 5000} | budget
    run = Run("trial", 1, model, "mnist-static", "", flow, length, seed, profile, budget)
    full = {}
    for name, value in values.items():
        pair = value if isinstance(value, tuple) else (value, 0.1)
        full[name] = {"value": pair[0], "std_error": pair[1]}
    return Record(run, full, arrays or {})


def test_a_finding_needs_its_values():
    assert str(Finding("{a:.1f} and {b[0]}", {"a": 1.25, "b": ["x"]})) == "1.2 and x"
    with pytest.raises(KeyError, match="a"):
        str(Finding("{a}", {}))
    assert write_findings([SMOKE, SMOKE], between="\n\n") == f"{SMOKE}\n\n{SMOKE}"


# MNIST


def image_record(F, length, **more):
    "A record of images with free energy `F` of test images."
    values = {"F": F, "nll": F - 2.0, "kl": 2.0, "F_train": F - 1.0, "nll_train": F - 3.5, "F_valid": F + 0.5}
    per_image = {"test_elbo": np.array([-F - 1, -F + 1]), "test_log_p": np.array([-F + 1, -F + 3])}
    return made_up(values, per_image, length=length, **more)


def image_rows(**more):
    return {("planar", 0): [image_record(100.0, 0, **more)], ("planar", 10): [image_record(98.0, 10, **more)]}


def test_what_a_flow_gains_on_mnist():
    text = write_findings(vae_mnist.conclude_gain(image_rows(), "MNIST"))
    assert text.startswith(
        "On MNIST, after 10,000 updates, 10 planar layers lower the free energy by 2.00 ± "
    )
    assert "is estimated to miss at least 2.00 nats without them and 2.00 with them." in text
    assert text.endswith("every verdict is *shortened*, whatever the difference.")
    published = write_findings(vae_mnist.conclude_gain(image_rows(updates=500_000), "MNIST"))
    assert "after 500,000 updates" in published and "shortened" not in published
    assert vae_mnist.conclude_gain(image_rows(profile="smoke"), "MNIST") == [SMOKE]


def differences(table_2, fig_4b):
    "Ours minus published for K = 0 and 10."
    found = {}
    for K, in_table, in_figure in zip((0, 10), table_2, fig_4b, strict=True):
        for item, value in (("Table 2", in_table), ("Fig 4a", 0.1), ("Fig 4b", in_figure), ("Fig 4c", -0.2)):
            found[item, vae_mnist.row_name(item, "planar", K)] = value
    return found


def test_near_the_paper_and_far_from_it():
    near = write_findings(
        vae_mnist.conclude_against_paper(image_rows(), differences((0.4, -1.0), (0.3, -0.2)))
    )
    assert "over the 2 rows: $F$ +0.1 to +0.1 nats, the divergence of the posterior -0.2 to +0.3" in near
    assert near.endswith("Of 2 rows of Table 2, 2 are within half a nat of the printed value or below it. ")
    far = write_findings(vae_mnist.conclude_against_paper(image_rows(), differences((0.4, 0.6), (0.3, -0.2))))
    assert (
        "2, 1 are within half a nat of the printed value or below it: all but planar K = 10 (+0.6). " in far
    )
    assert vae_mnist.conclude_against_paper(image_rows(), {}) == []
    assert vae_mnist.conclude_against_paper(image_rows(profile="smoke"), differences((0, 0), (0, 0))) == []


def test_pairs_of_which_the_second_should_be_better():
    keys = [("planar", 0), ("planar", 10), ("nice-perm", 10), ("nice-ortho", 10)]
    assert vae_mnist.pairs_to_compare(dict.fromkeys(keys)) == [
        (keys[0], keys[1]),
        (keys[0], keys[2]),
        (keys[2], keys[1]),
    ]
    assert vae_mnist.pairs_to_compare({}) == []


# Evaluation


def evaluation_record(low, length, gain=0.0, **more):
    "A record of an evaluation in which AIS is `low` nats above IWAE, with an error of 0.1."
    values = {
        "simulated_ais_minus_iwae": (low, 0.1),
        "simulated_ais_width": 0.5,
        "simulated_above_iwae": 0.7,
        "simulated_prior_width": 9.0,
        "real_ais_minus_iwae": 0.2,
        "amortisation": 1.0,
        "approximation": 2.0,
    }
    noise = np.array([-0.1, 0.1, 0.0, 0.0])
    arrays = {"real_iwae": length / 10 + gain + noise, "real_ais": np.full(4, length / 10)}
    return made_up(values, arrays, length=length, **more)


@pytest.mark.parametrize(
    "low, said",
    [
        (0.3, "lies 0.30 ± 0.10 below the lower one: it is too low by at least that much."),
        (-0.3, "lies 0.30 ± 0.10 above the lower and 0.70 below the upper one: it is the better lower bound"),
        (0.1, "agrees with the lower one (+0.10 ± 0.10)."),
    ],
)
def test_importance_sampling_between_the_bounds(low, said):
    shown = {0: evaluation_record(low, 0), 40: evaluation_record(0.0, 40)}
    text = write_findings(vae_evaluation.conclude(shown))
    assert text.startswith(
        "*diagonal Gaussian*: on its simulated images the annealed bounds are 0.50 nats apart"
    )
    assert said in text and "leaves 9.0 and 9.0 nats" in text
    assert text.endswith("for the planar K = 40 posterior the encoder loses 1.00 nats and the family 2.00.")
    assert "$\\mathrm{KL}(q" in text


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_importance_sampling_flatters_the_flow_or_not(gain):
    shown = {0: evaluation_record(0.0, 0), 40: evaluation_record(0.0, 40, gain=gain)}
    text = write_findings(vae_evaluation.conclude(shown))
    assert f"better by {4 + gain:.2f} nats when judged by importance sampling and by 4.00" in text
    assert ("exaggerates what the flow gains" in text) == (gain > 0)
    smoke = {0: evaluation_record(0.0, 0, profile="smoke")}
    assert vae_evaluation.conclude(smoke) == [SMOKE]


# CIFAR


def patch_record(nll, length, missed=5.0, shift=0.0, **more):
    values = {"F": nll + 5, "nll": nll, "kl": missed, "saturated": 3.0, "log_p_saturated": 20.0}
    values |= {"log_p_others": 300.0, "kl_prior": 25.0}
    arrays = {
        "test_elbo": np.array([-nll - 6, -nll - 4]),
        "test_log_p": np.array([-nll - 1, -nll + 1]) + shift,
    }
    return made_up(values, arrays | {"patches": np.zeros((2, 192))}, length=length, **more)


def test_what_a_flow_gains_on_patches():
    plain = {0: [patch_record(-290.0, 0)], 10: [patch_record(-293.0, 10)]}
    text = write_findings(vae_cifar.conclude(plain, {}, 27.0, ["shortened", "shortened"]), " ")
    assert text.startswith(
        "After 10,000 updates, $-\\ln p$ of a patch is -293.0 nats with K = 10. Against K = 0"
    )
    assert "lower by 3.0 ± " in text and "gain is 27.0 nats, unconfirmed; with K = 0 our posterior is" in text
    assert "dominate. Verdict beside the printed values: *shortened*." in text and "noise" not in text
    text = write_findings(vae_cifar.conclude(plain, {}, 4.0, []), " ")
    assert "gain is 4.0 nats, unconfirmed. Of the 285 nats" in text and "Verdict" not in text
    alone = write_findings(vae_cifar.conclude({0: plain[0]}, {}, math.nan, []), " ")
    assert "with K = 0. Of the" in alone and "gain" not in alone
    assert vae_cifar.conclude({0: [patch_record(0.0, 0, profile="smoke")]}, {}, math.nan, []) == [SMOKE]
    assert "Not run" in write_findings(vae_cifar.conclude({}, {}, math.nan, []))


@pytest.mark.parametrize("nats, peaks", [(3.0, True), (0.0, False)])
def test_noise_that_costs_and_noise_that_does_not(nats, peaks):
    "Only the unit differs if the noise costs nothing: 192 ln(256 / 255) nats."
    unit = 192 * math.log(256 / 255)
    plain = {0: [patch_record(-290.0, 0)]}
    noisy = {0: [patch_record(-290.0, 0, shift=unit - nats)]}
    noisy[0][0].arrays["test_log_p"] += np.array([-0.1, 0.1])
    text = write_findings(vae_cifar.conclude(plain, noisy, math.nan, []), " ")
    assert f"changes $-\\ln p$ by {nats:+.1f} ± 0.1 nats at K = 0" in text
    assert ("from the levels being discrete" in text) == peaks != ("no sign of peaks" in text)
    assert "5.82 bits per dimension" in text


# Convolutions


def convolution_groups(profile="quick", updates=10_000, **F):
    "Two seeds of every family, with the free energies given, else 100, and a spread of 0.02 over seeds."
    best = {}
    for family, K in vae_convolution.LENGTHS.items():
        best[family] = []
        for seed in (0, 1):
            level = F.get(family.replace("-", "_"), 100.0) + (0.02 * seed if family != "diagonal" else 0)
            values = {"F": level, "correlation": 3.0, "negentropy": 1.0}
            arrays = {"test_elbo": np.array([-level - 1, -level + 1])}
            record = made_up(values, arrays, family, K, seed, profile=profile, updates=updates)
            best[family].append(record)
    return best


@pytest.mark.parametrize(
    "level, said",
    [(99.0, "(better than none)"), (101.0, "(worse than none)"), (99.98, "(no difference beyond")],
)
def test_the_linear_control(level, said):
    text = write_findings(vae_convolution.conclude(convolution_groups(circulant=level)), "\n\n")
    assert said in text and text.startswith(
        f"**The linear control.** One circulant layer changes $F$ by {level - 99.99:+.2f}"
    )


@pytest.mark.parametrize(
    "scales, said",
    [
        (99.0, "the gain of the scales would"),
        (101.0, "the loss of the scales would"),
        (100.0, "makes no difference"),
    ],
)
def test_scales_and_gates(scales, said):
    best = convolution_groups(circulant_diagonal=scales)
    for seed in (0, 1):  # so that seeds do not agree to the last digit
        best["circulant-diagonal"][seed].arrays["test_elbo"] += 0.02 * seed
    assert said in write_findings(vae_convolution.conclude(best), "\n\n")


def test_order_and_shares_of_convolutions():
    text = write_findings(vae_convolution.conclude(convolution_groups(conf=97.0, planar=98.0)), "\n\n")
    assert "against the diagonal Gaussian: CONF -2.99 ± 0.01; planar -1.99 ± 0.01; " in text
    assert "correlation is 75 % (planar), 75 % (NICE-perm), 75 % (CONF). Against" in text
    assert text.endswith("a longer one moves all of them.")
    long = write_findings(vae_convolution.conclude(convolution_groups(updates=100_000)), "\n\n")
    assert "short training" not in long
    assert vae_convolution.conclude(convolution_groups(profile="smoke")) == [SMOKE]


# Posteriors


@pytest.mark.parametrize(
    "full, said", [(0.1, "wins 90 percent"), (1.2, "a full covariance wins -0.200 nats")]
)
def test_what_families_win_in_the_plane(full, said):
    kl = {("diagonal", 0): 1.0, ("full", 1): full, ("planar", 2): 0.5, ("planar", 8): 0.0}
    per_image = {key: np.full(20, level) for key, level in kl.items()}
    per_image["planar", 8] = np.array([0.0] * 18 + [0.0, 1e-9])
    text = str(posteriors._conclude_pictures(per_image))
    assert text.startswith(
        "**In the plane.** Over 20 images the diagonal Gaussian is 1.000 nats away on average"
    )
    assert "planar flows 0.500 (K = 2), 0.000 (K = 8). " in text and said in text
    assert text.endswith("with K = 8, where the tenth of the images with the largest divergences brings "
                         "100 percent of the mean.")  # fmt: skip


def test_whether_the_chain_grows():
    never = math.inf
    fitted = {"AR(1)": {4: 2.0, 8: 5.0}, "equicorrelated": {4: 2.0, 8: 2.1}}
    linear = {"AR(1)": {4: 1.0, 8: never}, "equicorrelated": {4: 1.0, 8: 1.0}}
    text = str(posteriors._conclude_lengths(fitted, linear))
    assert "planar 2.0 (D = 4), 5.0 (D = 8); linear of rank one 1.0, not reached. " in text
    assert "AR(1): yes; equicorrelated: no. " in text and text.endswith("(D = 8)? The answer is: yes.")
    text = str(posteriors._conclude_lengths({name: {4: never, 8: never} for name in fitted}, linear))
    assert "AR(1): undecided, since neither length was reached; equicorrelated: undecided" in text


@pytest.mark.parametrize("kl, below", [(1.0, 0), (0.5, 1)])
def test_whether_bending_helped(kl, below):
    fits = [made_up({"kl": (level, 0.1), "of_rank": 1.0}) for level in (kl, 1.2)]
    text = str(posteriors._conclude_bending(fits))
    assert f"lie {below} of the 2 planar fits" in text
    assert text.endswith("there, bending helped." if below else "there is no sign that bending helped.")


def test_levels_in_one_dimension():
    def gaussians(model, D, flow):
        lengths = (1, 64) if flow == "planar" else (1,)
        values = {"mean_field": 5.0, "parameters": 1200.0}
        return {K: [made_up({"kl": 2.0 / K} | values, flow=flow, length=K)] for K in lengths}

    text = str(posteriors._conclude_levels("AR(1)", 16, gaussians))
    assert text == (
        "AR(1), D = 16: 5.00 nats with a diagonal Gaussian, 2.00 with K = 1, 0.03 with K = 64 "
        "(1,200 parameters), 2.00 with one IAF step (1,200) and 2.000 with a full covariance."
    )


# Energies


def test_conclusions_about_the_energies():
    fits = {}
    levels = {("planar", 2): 0.5, ("planar", 8): 0.1, ("nice-perm", 2): 3.2, ("nsf", 8): 0.05}
    for (flow, K), kl in levels.items():
        values = {"kl": kl, "missed": 0.5 if flow == "nice-perm" else 0.0}
        fits[flow, K] = {
            name: [made_up(values, flow=flow, length=K, model=name)] for name in energies.TARGETS
        }
    text = write_findings(energies.conclude(fits, "quick"))
    assert "to a divergence of 0.500 nats at K = 2, 0.100 nats at K = 8 (medians over 1 seeds).\n\n" in text
    assert "of all families: 0.050 on $U_1$ (NSF, K = 8), 0.050 on $U_2$" in text
    assert "Of the paper's four families: 0.100 on $U_1$ (planar, K = 8)" in text
    assert "4 of 16 fits miss more" in text and "ends on $U_1$ at 3.20 nats, a seed each" in text
    assert not text.endswith(str(SMOKE))
    assert write_findings(energies.conclude(fits, "smoke")) == f"{text}\n\n{SMOKE}"
