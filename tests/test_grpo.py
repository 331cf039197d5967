"""grpo.py: Eq. 1 against numbers by hand, Python loops, autograd and exact enumeration over a small
vocabulary."""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from conftest import close, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo

NAN, ZERO = float("nan"), torch.zeros(1)
pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("double_and_seeded")]
exact = settings(derandomize=True, deadline=None, max_examples=60)


# --- group_advantages -----------------------------------------------------------------------------


def test_advantages_by_hand():
    # mean 1, unbiased std sqrt(2/3) = 0.81649658, eps 1e-4
    close(
        grpo.group_advantages(tensor([[0, 1, 1, 2]])), tensor([[-1.2245949, 0, 0, 1.2245949]]), 1e-7
    )
    # 4 of 8 right: the unbiased std gives 0.9352, the population std would give 1
    half = grpo.group_advantages(tensor([[1] * 4 + [0] * 4]))
    close(half, tensor([[0.9352394] * 4 + [-0.9352394] * 4]), 1e-7)


def test_eps_is_added_to_the_std_and_is_1e_4():
    # std sqrt(2) 1e-4: with eps inside the root, or none, the numbers would be far off
    close(grpo.group_advantages(tensor([[0, 2e-4]])), tensor([[-1, 1]]) / (math.sqrt(2) + 1), 1e-9)
    close(
        grpo.group_advantages(tensor([[0, 2.0]]), eps=1.0),
        tensor([[-1, 1]]) / (math.sqrt(2) + 1),
        1e-12,
    )


@exact
@given(st.lists(st.lists(st.floats(-3, 3), min_size=5, max_size=5), min_size=1, max_size=4))
def test_advantages_equal_the_python_loop_and_sum_to_zero(rows):
    """Advantages equal the Python loop group by group. Those of a group sum to zero."""
    got = grpo.group_advantages(tensor(rows))
    for row, adv in zip(rows, got, strict=True):
        mean, std = statistics.fmean(row), statistics.stdev(row)
        close(adv, tensor([(r - mean) / (std + 1e-4) for r in row]), 1e-9)
        assert abs(adv.sum()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1.1, 2.1, -0.7])
def test_a_tied_group_gives_exactly_zero(dtype, reward):
    rewards = torch.full((2, 7), reward, dtype=dtype)  # 7: the mean of seven 0.1 is not 0.1
    rewards[1, 0] = 5.0
    tied, other = grpo.group_advantages(rewards)
    assert torch.equal(tied, torch.zeros(7, dtype=dtype))
    assert other.abs().min() > 0.1


def test_rounding_noise_in_a_tied_group_is_no_advantage():
    """Rounding noise in a tied group does not become an advantage."""
    rewards = torch.tensor(
        [[0.3, 0.1 + 0.2, 0.3, 0.3], [1.0, 1.0 + 1.2e-7, 1.0, 1.0]], dtype=torch.float32
    )
    assert rewards[1, 0] != rewards[1, 1]
    assert grpo.group_advantages(rewards).abs().max() < 2e-3  # without eps it would be 1.5
    noisy = tensor([[0.3, 0.1 + 0.2, 0.3, 0.3]])
    assert noisy[0, 0] != noisy[0, 1]
    assert grpo.group_advantages(noisy).abs().max() < 1e-9


def test_an_unknown_reward_gets_advantage_zero():
    """An unknown reward leaves the statistics. It gets advantage zero."""
    got = grpo.group_advantages(tensor([[0, NAN, 1, 1, NAN, 2], [3, 4, 5, 6, 7, 8]]))
    known = grpo.group_advantages(tensor([[0, 1, 1, 2]]))[0]
    close(got[0, [0, 2, 3, 5]], known, 1e-14)
    assert torch.equal(got[0, [1, 4]], torch.zeros(2))
    # the other group does not notice
    close(got[1], grpo.group_advantages(tensor([[3, 4, 5, 6, 7, 8]]))[0], 1e-14)


def test_groups_with_nothing_to_compare_get_zero_and_no_nan():
    got = grpo.group_advantages(tensor([[NAN] * 4, [NAN, 2, NAN, NAN], [0.1, NAN, 0.1, 0.1]]))
    assert torch.equal(got, torch.zeros(3, 4))


@pytest.mark.parametrize("shape", [(4, 1), (4, 0), (8,), (2, 2, 2)])
def test_a_group_of_one_and_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="G > 1"):
        grpo.group_advantages(torch.zeros(shape))


def test_advantages_have_finite_gradients():
    """The gradients of advantages are finite, tied and unknown groups included."""
    rewards = tensor([[3, 3, 3], [1, 2, 3], [NAN] * 3, [NAN, 1, NAN], [NAN, 1, 2]]).requires_grad_()
    for eps in (1e-4, 0.0):
        adv = grpo.group_advantages(rewards, eps)
        assert adv.isfinite().all() and torch.equal(adv[[0, 2, 3]], torch.zeros(3, 3))
        [gradient] = torch.autograd.grad((adv * torch.randn(5, 3)).sum(), rewards)
        assert gradient.isfinite().all() and gradient[1].norm() > 0.1
        assert torch.equal(gradient[[0, 2, 3]], torch.zeros(3, 3))


def test_whole_and_yes_no_rewards_are_taken():
    whole = grpo.group_advantages(torch.tensor([[1, 0, 0, 1]]))
    close(whole, grpo.group_advantages(tensor([[1, 0, 0, 1]])))
    assert torch.equal(grpo.group_advantages(torch.tensor([[True, False, False, True]])), whole)
    assert torch.equal(
        grpo.total_reward({"a": torch.tensor([[1, 0]])}, {"a": 2.0}), tensor([[2, 0]])
    )


def test_advantages_ignore_a_shift_and_follow_a_permutation():
    """Advantages ignore a shift of the rewards. They follow a permutation of them."""
    rewards, order = torch.randn(3, 6), torch.randperm(6)
    adv = grpo.group_advantages(rewards)
    close(grpo.group_advantages(rewards + 7), adv, 1e-12)
    close(grpo.group_advantages(rewards[:, order]), adv[:, order], 1e-14)
    # group, not batch
    assert not torch.allclose(adv[0], grpo.group_advantages(rewards.view(1, -1))[0, :6])


# --- total_reward ---------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_by_name():
    """The total is the weighted sum by name and not by position."""
    components = {
        "caption": tensor([[0, 1]]),
        "accuracy": tensor([[1, 0]]),
        "format": tensor([[1, 1]]),
    }
    total = grpo.total_reward(components, {"accuracy": 1.0, "format": 0.1, "caption": 0.5})
    close(total, tensor([[1.1, 0.6]]), 1e-15)


def test_an_unknown_component_takes_its_mean_in_the_group():
    """An unknown component takes its own mean over its own group."""
    caption = tensor([[1, NAN, 0, 1], [NAN, NAN, 0, 0], [NAN, NAN, NAN, NAN]])
    accuracy = tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    total = grpo.total_reward(
        {"accuracy": accuracy, "caption": caption}, {"accuracy": 1.0, "caption": 2.0}
    )
    third = 2 / 3
    close(total, tensor([[3, 1 + 2 * third, 0, 2], [1, 1, 0, 0], [1, 1, 0, 0]]), 1e-15)


def test_an_unknown_component_neither_rewards_nor_punishes():
    """An unknown component neither rewards nor punishes. Zero in its place would punish."""
    caption = tensor([[1, NAN, 1, 1]])
    rewards = grpo.total_reward({"caption": caption}, {"caption": 1.0})
    assert torch.equal(grpo.group_advantages(rewards), torch.zeros(1, 4))
    assert grpo.group_advantages(caption.nan_to_num(0.0))[0, 1] < -1


def test_a_component_without_a_weight_is_an_error():
    with pytest.raises(KeyError):
        grpo.total_reward({"caption": tensor([[0, 1]])}, {"accuracy": 1.0})


# --- clipped_surrogate ----------------------------------------------------------------------------


def surrogate_loop(logp, old, adv, low, high):
    rows = []
    for i, a in enumerate(adv.tolist()):
        rho = [math.exp(x - y) for x, y in zip(logp[i].tolist(), old[i].tolist(), strict=True)]
        rows.append([min(r * a, min(max(r, 1 - low), 1 + high) * a) for r in rho])
    return tensor(rows)


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.4), (0.3, 0.05)])
def test_the_surrogate_equals_the_loop_over_tokens(low, high):
    logp, old, adv = torch.randn(6, 5), torch.randn(6, 5), tensor([2, 1, 0.3, -0.3, -1, -2])
    close(
        grpo.clipped_surrogate(logp, old, adv, low, high), surrogate_loop(logp, old, adv, low, high)
    )
    close(grpo.clipped_surrogate(logp, old, adv), surrogate_loop(logp, old, adv, 0.2, 0.2))


@pytest.mark.parametrize(
    "adv, rho, value, slope",
    [
        (2.0, 1.5, 2.4, 0.0),  # already much likelier: cut off
        (2.0, 0.5, 1.0, 1.0),  # good and still unlikely: rho A
        (-2.0, 0.5, -1.6, 0.0),  # already much less likely: cut off
        (-2.0, 1.5, -3.0, -3.0),  # bad and still likely: rho A, without bound
        (2.0, 1.1, 2.2, 2.2),  # inside: rho A
        (-2.0, 0.9, -1.8, -1.8),
        (0.0, 1.5, 0.0, 0.0),
    ],
)
def test_the_gradient_is_zero_in_the_two_dead_zones(adv, rho, value, slope):
    """The gradient is exactly zero in the two dead zones. It is rho A elsewhere."""
    logp = tensor([[math.log(rho)]]).requires_grad_()
    surrogate = grpo.clipped_surrogate(logp, torch.zeros(1, 1), tensor([adv]))
    surrogate.sum().backward()
    close(surrogate.item(), value)
    assert logp.grad.item() == 0.0 if slope == 0 else abs(logp.grad.item() - slope) < 1e-12


def test_at_ratio_one_the_surrogate_is_the_advantage():
    """The surrogate at ratio one is the advantage. Its gradient is that of REINFORCE."""
    logits, adv = torch.randn(4, 3, 7, requires_grad=True), torch.randn(4)
    logp = logits.log_softmax(-1)[..., 2]
    surrogate = grpo.clipped_surrogate(logp, logp.detach(), adv)
    assert torch.equal(surrogate, adv[:, None].expand(4, 3))
    [ours] = torch.autograd.grad(surrogate.sum(), logits, retain_graph=True)
    [reinforce] = torch.autograd.grad((logp * adv[:, None]).sum(), logits)
    assert torch.equal(ours, reinforce)


# --- kl_penalty -----------------------------------------------------------------------------------


def policies(vocabulary=12):
    """(z, log pi, log pi_ref) over a vocabulary small enough to enumerate."""
    z = torch.randn(vocabulary, requires_grad=True)
    return z, z.log_softmax(-1), torch.randn(vocabulary).log_softmax(-1)


def reverse_kl(logp, ref):  # KL(pi || pi_ref)
    return F.kl_div(ref, logp, log_target=True, reduction="sum")


def forward_kl(logp, ref):  # KL(pi_ref || pi)
    return F.kl_div(logp, ref, log_target=True, reduction="sum")


@pytest.mark.parametrize(
    "kind, value", [("k1", 0.69314718), ("k2", 0.24022651), ("k3", 0.19314718)]
)
def test_the_kl_estimators_by_hand(kind, value):
    logp, ref = tensor([[0.5]]).log(), tensor([[0.25]]).log()
    close(grpo.kl_penalty(logp, ref, kind), tensor([[value]]), 1e-8)
    swapped = {"k1": -0.69314718, "k2": 0.24022651, "k3": 2 - 0.69314718 - 1}[kind]
    close(grpo.kl_penalty(ref, logp, kind), tensor([[swapped]]), 1e-8)


def test_k3_is_the_default_and_rho_k3_has_its_value():
    logp, ref = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(grpo.kl_penalty(logp, ref), grpo.kl_penalty(logp, ref, "k3"))
    assert torch.equal(grpo.kl_penalty(logp, ref, "rho_k3"), grpo.kl_penalty(logp, ref, "k3"))


@exact
@given(st.floats(-20, 20), st.floats(-20, 20))
def test_k3_is_never_negative(a, b):
    assert grpo.kl_penalty(tensor([[a]]), tensor([[b]]), "k3").item() >= 0.0
    assert grpo.kl_penalty(tensor([[a]]), tensor([[a]]), "k3").item() == 0.0


@pytest.mark.parametrize("x", [1e-5, -1e-5, 1e-8, -1e-8])
def test_k3_keeps_its_digits_near_the_reference(x):
    got = grpo.kl_penalty(tensor([[0.0]]), tensor([[x]]), "k3").item()
    # e^x - x - 1, written out, would lose every digit
    assert got == pytest.approx(x * x / 2, rel=1e-4, abs=0)


def test_k1_and_k3_are_unbiased_for_the_reverse_kl_and_k2_is_not():
    _, logp, ref = policies()
    expected = {
        k: (logp.exp() * grpo.kl_penalty(logp[None], ref[None], k)[0]).sum().item()
        for k in grpo.KL_KINDS
    }
    kl = reverse_kl(logp, ref).item()
    for kind in ("k1", "k3", "rho_k3"):
        assert abs(expected[kind] - kl) < 1e-12
    assert abs(expected["k2"] - kl) > 1e-3
    assert abs(forward_kl(logp, ref).item() - kl) > 1e-3  # the two KLs can be told apart here


@pytest.mark.parametrize("kind", grpo.KL_KINDS)
def test_expected_gradient_of_each_kl_estimator(kind):
    """Exact enumeration gives the expected gradient of each estimator in the loss."""
    z, logp, ref = policies()
    [reverse] = torch.autograd.grad(reverse_kl(logp, ref), z, retain_graph=True)
    [forward] = torch.autograd.grad(forward_kl(logp, ref), z, retain_graph=True)
    # every token as a sample, weighted with its probability, which is the sampler's and so carries
    # no gradient
    expected = (
        logp.detach().exp() * grpo.kl_penalty(logp[:, None], ref[:, None], kind)[:, 0]
    ).sum()
    [got] = torch.autograd.grad(expected, z)
    want = {"k1": torch.zeros_like(z), "k2": reverse, "rho_k3": reverse, "k3": forward}[kind]
    close(got, want, 1e-14)
    close(forward, (logp.exp() - ref.exp()).detach(), 1e-14)
    assert (reverse - forward).abs().max() > 1e-2 and reverse.abs().max() > 1e-2


def test_an_unknown_kl_kind_is_refused():
    with pytest.raises(ValueError, match="k4"):
        grpo.kl_penalty(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


# --- sequence_weights -----------------------------------------------------------------------------


def ragged_mask(lengths, width):
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).double()


@pytest.mark.parametrize(
    "norm, short, long", [("sequence", 0.05, 0.005), ("token", 1 / 110, 1 / 110)]
)
def test_weights_by_hand_for_lengths_10_and_100(norm, short, long):
    weights = grpo.sequence_weights(
        ragged_mask([10, 100], 128), norm, sequences=2, tokens=110, max_tokens=128
    )
    close(weights[0, :10], torch.full((10,), short), 1e-15)
    close(weights[1, :100], torch.full((100,), long), 1e-15)
    assert weights[0, 10:].abs().sum() == 0 and weights[1, 100:].abs().sum() == 0
    close(weights.sum().item(), 1.0)


def test_the_constant_norm_divides_by_the_longest_allowed():
    """The constant norm divides by the length of the longest response allowed."""
    weights = grpo.sequence_weights(
        ragged_mask([10, 100], 128), "constant", sequences=2, tokens=110, max_tokens=512
    )
    close(weights, ragged_mask([10, 100], 128) / 1024, 1e-15)


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_a_response_without_tokens_weighs_nothing(norm):
    """A response without tokens weighs nothing. A boolean mask will do."""
    mask = ragged_mask([0, 3], 4)
    weights = grpo.sequence_weights(mask, norm, 2, 3, 4)
    assert weights.isfinite().all() and weights[0].abs().sum() == 0 and weights[1, 0] > 0
    assert torch.equal(grpo.sequence_weights(mask.bool(), norm, 2, 3, 4), weights)
    assert torch.equal(grpo.sequence_weights(mask.long(), norm, 2, 3, 4), weights)


def test_lengths_are_weighted_in_the_gradient_as_the_norm_says():
    mask, logp = ragged_mask([2, 5], 5), torch.zeros(2, 5, requires_grad=True)
    for norm, short, long in (
        ("sequence", 1 / 4, 1 / 10),
        ("token", 1 / 7, 1 / 7),
        ("constant", 1 / 20, 1 / 20),
    ):
        loss, stats = grpo.grpo_loss(logp, logp.detach(), -1.0, mask, loss_norm=norm, max_tokens=10)
        [gradient] = torch.autograd.grad(loss, logp)
        close(gradient, mask * tensor([[short], [long]]))
    far = grpo.grpo_loss(torch.full((2, 5), 3.0), torch.zeros(2, 5), 1.0, mask)[1]["clipped"]
    assert torch.equal(far, mask)  # what is padding is not clipped


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_no_tokens_at_all_give_zero_and_no_nan(norm):
    logp = torch.zeros(2, 3, requires_grad=True)
    loss, _ = grpo.grpo_loss(logp, logp.detach(), 1.0, torch.zeros(2, 3), loss_norm=norm)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logp.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("distance", [100.0, 500.0, -500.0])
@pytest.mark.parametrize("kind", grpo.KL_KINDS)
def test_log_ratios_beyond_single_precision_give_no_nan(kind, distance):
    for adv in (1.0, 0.0, -1.0):
        logp = torch.zeros(1, 2, dtype=torch.float32, requires_grad=True)
        far = torch.full((1, 2), -distance, dtype=torch.float32)
        loss, _ = grpo.grpo_loss(logp, far, adv, torch.ones(1, 2), -far, 0.04, kl_kind=kind)
        loss.backward()
        assert loss.isfinite() and logp.grad.isfinite().all()
        z = torch.randn(1, 4, dtype=torch.float32)
        assert (
            grpo.logit_gradient(z, torch.tensor([1]), adv, far[:, 0], -far[:, 0], beta=0.04)
            .isfinite()
            .all()
        )


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="mean"):
        grpo.sequence_weights(torch.ones(1, 1), "mean", 1, 1, 1)


# --- grpo_loss ------------------------------------------------------------------------------------


def batch(n=8, width=6, vocabulary=5):
    """Logits of n ragged responses, what was sampled, and everything the loss needs."""
    logits = torch.randn(n, width, vocabulary, requires_grad=True)
    y = torch.randint(vocabulary, (n, width))
    mask = ragged_mask(torch.randint(1, width + 1, (n,)).tolist(), width)
    logp = logits.log_softmax(-1).gather(-1, y[..., None])[..., 0]
    old, ref = (
        logp.detach() + 0.3 * torch.randn(n, width),
        logp.detach() + 0.5 * torch.randn(n, width),
    )
    return logits, logp, old, ref, torch.randn(n), mask


def loss_loop(logp, old, ref, adv, mask, norm, beta, kind, max_tokens, low=0.2, high=0.2):
    """Eq. 1 the slow way: a Python number."""
    surrogate, total, n = surrogate_loop(logp, old, adv, low, high), 0.0, len(logp)
    for i in range(n):
        length = int(mask[i].sum())
        for t in range(length):
            x = ref[i, t].item() - logp[i, t].item()
            kl = {
                "k1": -x,
                "k2": x * x / 2,
                "k3": math.exp(x) - x - 1,
                "rho_k3": math.exp(x) - x - 1,
            }[kind]
            size = {"sequence": n * length, "token": mask.sum().item(), "constant": n * max_tokens}[
                norm
            ]
            total += (-surrogate[i, t].item() + beta * kl) / size
    return total


@pytest.mark.parametrize("kind", grpo.KL_KINDS)
@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_the_loss_equals_eq_1_written_as_a_loop(norm, kind):
    _, logp, old, ref, adv, mask = batch()
    loss, _ = grpo.grpo_loss(logp, old, adv, mask, ref, 0.3, 0.1, 0.4, kind, norm, max_tokens=10)
    close(loss.item(), loss_loop(logp, old, ref, adv, mask, norm, 0.3, kind, 10, 0.1, 0.4))
    assert loss.ndim == 0


def test_without_beta_there_is_no_kl():
    """The loss without beta has no KL. The reference does not matter to it."""
    _, logp, old, ref, adv, mask = batch()
    plain, stats = grpo.grpo_loss(logp, old, adv, mask)
    assert stats["kl"] is None
    with_reference, stats = grpo.grpo_loss(logp, old, adv, mask, ref, 0.0)
    assert torch.equal(plain, with_reference) and stats["kl"] is None
    close(plain.item(), loss_loop(logp, old, ref, adv, mask, "sequence", 0.0, "k3", 6))


def test_the_defaults_are_k3_and_a_symmetric_clip_of_0_2():
    _, logp, old, ref, adv, mask = batch()
    loss, _ = grpo.grpo_loss(logp, old, adv, mask, ref, 0.3)
    close(loss.item(), loss_loop(logp, old, ref, adv, mask, "sequence", 0.3, "k3", 6))


def test_the_ratio_is_taken_against_the_sampler():
    """The ratio is taken against the sampler and not against the reference."""
    logp, far = torch.full((1, 1), -1.0, requires_grad=True), torch.full((1, 1), -9.0)
    loss, stats = grpo.grpo_loss(
        logp, logp.detach(), tensor([1.0]), torch.ones(1, 1), far, beta=1e-9
    )
    loss.backward()
    # rho = 1, though pi / pi_ref = e^8
    assert abs(logp.grad.item() + 1) < 1e-5 and stats["clipped"].item() == 0


def test_the_statistics_are_the_kl_and_the_dead_zones():
    """The statistics are the KL per token and the dead zones. They carry no gradient."""
    _, logp, old, ref, adv, mask = batch()
    _, stats = grpo.grpo_loss(logp, old, adv, mask, ref, 0.1, kl_kind="k2")
    close(stats["kl"][mask > 0], (ref - logp.detach()).square()[mask > 0] / 2, 1e-15)
    assert not stats["kl"].requires_grad and not stats["clipped"].requires_grad
    free = logp.detach().requires_grad_()
    grpo.grpo_loss(free, old, adv, torch.ones_like(mask), eps_low=0.1, eps_high=0.3)[0].backward()
    _, stats = grpo.grpo_loss(free, old, adv, torch.ones_like(mask), eps_low=0.1, eps_high=0.3)
    assert torch.equal(stats["clipped"].bool(), free.grad == 0)
    assert 0 < stats["clipped"].mean() < 1


def test_at_ratio_one_the_loss_has_the_gradient_of_reinforce():
    """The loss at ratio one is about zero. Its gradient is that of REINFORCE."""
    logits, logp, _, _, _, mask = batch()
    adv = grpo.group_advantages(torch.randn(2, 4)).flatten()
    weights = grpo.sequence_weights(mask, "sequence", 8, mask.sum().item(), 6)
    loss, _ = grpo.grpo_loss(logp, logp.detach(), adv, mask)
    assert abs(loss.item()) < 1e-14
    [ours] = torch.autograd.grad(loss, logits, retain_graph=True)
    [reinforce] = torch.autograd.grad(-(weights * adv[:, None] * logp).sum(), logits)
    close(ours, reinforce, 1e-16)
    assert ours.norm() > 0.05


def test_equal_rewards_give_exactly_no_gradient():
    logits, logp, _, _, _, mask = batch()
    adv = grpo.group_advantages(torch.full((2, 4), 1.1)).flatten()
    grpo.grpo_loss(logp, logp.detach(), adv, mask)[0].backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_micro_batches_of_any_size_give_the_same_gradient(norm):
    """Micro-batches of any size give the same loss and gradient with global counts."""
    logits, logp, old, ref, adv, mask = batch()

    def accumulated(size, local=False):
        grad, total = torch.zeros_like(logits), 0.0
        for rows in torch.arange(8).split(size):
            sequences, tokens = (
                (len(rows), mask[rows].sum().item()) if local else (8, mask.sum().item())
            )
            counts = {"loss_norm": norm, "sequences": sequences, "tokens": tokens, "max_tokens": 6}
            loss, _ = grpo.grpo_loss(
                logp[rows], old[rows], adv[rows], mask[rows], ref[rows], 0.2, **counts
            )
            share = len(rows) / 8 if local else 1.0
            grad += torch.autograd.grad(loss * share, logits, retain_graph=True)[0]
            total += loss.item() * share
        return total, grad

    whole, whole_grad = accumulated(8)
    for size in (4, 2, 1, 3):
        part, part_grad = accumulated(size)
        close(part, whole, 1e-14)
        close(part_grad, whole_grad, 1e-14)
    if norm == "token":  # the trap: a mean of per-micro-batch means is another loss
        assert abs(accumulated(2, local=True)[0] - whole) > 1e-3


@pytest.mark.parametrize("garbage", [7.0, -1e4, 1e4, float("inf"), -float("inf"), NAN])
@pytest.mark.parametrize("where", ["logp", "old", "ref"])
def test_padding_changes_neither_loss_nor_gradient(where, garbage):
    """Padding may hold anything. It changes neither loss nor gradient."""
    _, logp, old, ref, adv, mask = batch()
    clean = {"logp": logp.detach(), "old": old, "ref": ref}
    dirty = {**clean, where: torch.where(mask > 0, clean[where], garbage)}

    def run(values, beta, kind):
        leaf = values["logp"].clone().requires_grad_()
        loss, _ = grpo.grpo_loss(leaf, values["old"], adv, mask, values["ref"], beta, kl_kind=kind)
        loss.backward()
        return loss.detach(), leaf.grad

    assert (mask == 0).any()
    for beta, kind in [(0.0, "k3"), *((0.2, kind) for kind in grpo.KL_KINDS)]:
        (loss, grad), (dirty_loss, dirty_grad) = run(clean, beta, kind), run(dirty, beta, kind)
        assert torch.equal(loss, dirty_loss)
        assert torch.equal(dirty_grad[mask > 0], grad[mask > 0]) and grad.abs().sum() > 0
        assert torch.equal(dirty_grad[mask == 0], torch.zeros_like(grad[mask == 0])), kind


def test_one_step_favours_good_tokens_and_the_reference():
    """One step down the loss favours good tokens. It pulls towards the reference."""
    z = torch.zeros(2, 5, requires_grad=True)
    logp = z.log_softmax(-1)[:, :1]
    grpo.grpo_loss(logp, logp.detach(), tensor([1.0, -1.0]), torch.ones(2, 1))[0].backward()
    after = (z - 0.1 * z.grad).softmax(-1)[:, 0]
    assert after[0] > 0.2 > after[1]

    z, logp, ref = policies()
    every = {
        "mask": logp.detach().exp()[:, None],
        "loss_norm": "constant",
        "sequences": 1,
    }  # by its probability
    loss, _ = grpo.grpo_loss(
        logp[:, None], logp.detach()[:, None], 0.0, ref_logp=ref[:, None], beta=1.0, **every
    )
    loss.backward()
    closer = (z - 0.1 * z.grad).log_softmax(-1)
    assert forward_kl(closer, ref) < forward_kl(logp, ref) and reverse_kl(closer, ref) < reverse_kl(
        logp, ref
    )


# --- Eq. 2: the logit gradient --------------------------------------------------------------------


def autograd_gradient(z, y, adv, old=None, ref=None, beta=0.0, low=0.2, high=0.2):
    """dL/dz of one token a row through grpo_loss and autograd.   [N, V], [N], [N] -> [N, V]"""
    z = z.detach().clone().requires_grad_()
    logp = z.log_softmax(-1).gather(-1, y[:, None])
    old = logp.detach() if old is None else old[:, None]
    ref = None if ref is None else ref[:, None]
    loss, _ = grpo.grpo_loss(
        logp, old, adv, torch.ones(len(z), 1), ref, beta, low, high, sequences=1
    )
    return torch.autograd.grad(loss, z)[0]


def tokens(n=2000, vocabulary=7):
    """Logits, sampled tokens, advantages of both signs, and the log-probs of a sampler and of a
    reference."""
    z, y = 1.5 * torch.randn(n, vocabulary), torch.randint(vocabulary, (n,))
    logp = z.log_softmax(-1).gather(-1, y[:, None])[:, 0]
    return z, y, torch.randn(n), logp + 0.4 * torch.randn(n), logp + torch.randn(n)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.4)])
def test_the_logit_gradient_is_autograd_s(low, high, beta):
    """The logit gradient is autograd's, dead zones and KL included."""
    z, y, adv, old, ref = tokens()
    got = grpo.logit_gradient(z, y, adv, old, ref, low, high, beta)
    close(got, autograd_gradient(z, y, adv, old, ref, beta, low, high), 1e-12)
    logp = z.log_softmax(-1).gather(-1, y[:, None])[:, 0]
    dead = grpo.dead_zone(logp, old, adv, low, high)
    assert 0.1 < dead.double().mean() < 0.9
    if not beta:
        assert (
            torch.equal(got[dead], torch.zeros_like(got[dead]))
            and got[~dead].norm(dim=1).min() > 1e-6
        )
        assert torch.equal(got, grpo.logit_gradient(z, y, adv, old, None, low, high))


@pytest.mark.parametrize(
    "adv, rho, dead", [(1.0, 1.5, True), (1.0, 0.5, False), (-1.0, 0.5, True), (-1.0, 1.5, False)]
)
def test_the_four_sides_of_the_dead_zone(adv, rho, dead):
    z, y = torch.randn(1, 5), torch.tensor([2])
    old = z.log_softmax(-1)[:, 2] - math.log(rho)
    gradient = grpo.logit_gradient(z, y, tensor([adv]), old)
    assert grpo.dead_zone(z.log_softmax(-1)[:, 2], old, tensor([adv])).item() is dead
    assert torch.equal(gradient, torch.zeros(1, 5)) if dead else gradient.abs().min() > 1e-6


def test_the_kl_only_shifts_the_advantage():
    z, y, adv, old, ref = tokens()
    logp = z.log_softmax(-1).gather(-1, y[:, None])[:, 0]
    g, rho = ~grpo.dead_zone(logp, old, adv), (logp - old).exp()
    effective = g * rho * adv - 0.3 * (1 - (ref - logp).exp())
    close(
        grpo.logit_gradient(z, y, adv, old, ref, beta=0.3),
        grpo.logit_gradient(z, y, effective, logp),
        1e-12,
    )


def test_the_printed_eq_2_is_the_gradient_times_pi_old():
    """The printed Eq. 2 is the gradient times the sampler's probability."""
    z, y, adv, old, _ = tokens()
    pi = z.softmax(-1).gather(-1, y[:, None])[:, 0]
    free = grpo.logit_gradient(z, y, adv, old, None, 1.0, math.inf)  # no clip
    ours = free.gather(-1, y[:, None])[:, 0]
    close(ours * old.exp(), -pi * (1 - pi) * adv, 1e-13)


@pytest.mark.parametrize(
    "p, true, printed",
    [(1e-4, 0.9999, 9.999e-5), (0.5, 0.5, 0.25), (0.9, 0.1, 0.09), (0.999, 1e-3, 9.99e-4)],
)
def test_how_far_a_token_is_pushed_on_policy_by_hand(p, true, printed):
    z = tensor([[p, 1 - p]]).log()
    gradient = grpo.logit_gradient(z, torch.tensor([0]), tensor([1.0]), z[:, 0])
    close(-gradient[0, 0].item(), true)
    close(p * -gradient[0, 0].item(), printed)


def test_plain_numbers_and_other_whole_number_types_are_taken():
    z, y, _, old, _ = tokens(5)
    want = grpo.logit_gradient(z, y, torch.full((5,), 0.5), old)
    assert torch.equal(grpo.logit_gradient(z, y.int(), 0.5, old), want)
    pi = z.softmax(-1)
    many = grpo.entropy_change(pi[0], torch.arange(7), 0.1)  # every token of one distribution
    close(many[3], grpo.entropy_change(pi[0], 3, tensor(0.1)), 1e-15)
    close(grpo.entropy_change(pi, 3, 0.1)[0], many[3], 1e-15)
    assert torch.equal(grpo.clipped_surrogate(old[None], old[None], 2.0), torch.full((1, 5), 2.0))


def test_every_logit_gradient_sums_to_zero():
    """Every logit gradient sums to zero. A second derivative exists."""
    z, y, adv, old, ref = tokens(6)
    close(grpo.logit_gradient(z, y, adv, old, ref, beta=0.3).sum(-1), torch.zeros(6), 1e-13)
    assert torch.autograd.gradcheck(
        lambda z: grpo.logit_gradient(z, y, adv, old, ref, 0.9, 9.0, 0.3),
        z.clone().requires_grad_(),
    )


def test_three_ways_to_write_the_on_policy_gradient_are_one():
    z, y, adv, _, _ = tokens(50)
    gradients = []
    for form in (
        lambda lp: (lp - lp.detach()).exp() * adv,
        lambda lp: lp * adv,
        lambda lp: grpo.clipped_surrogate(lp[:, None], lp.detach()[:, None], adv)[:, 0],
    ):
        leaf = z.clone().requires_grad_()
        logp = leaf.log_softmax(-1).gather(-1, y[:, None])[:, 0]
        gradients.append(torch.autograd.grad(form(logp).sum(), leaf)[0])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_zero_sum_advantages_leave_a_constant_direction_alone():
    """Advantages that sum to zero leave a direction alone that all responses share."""
    adv = grpo.group_advantages(torch.randn(3, 8))
    shared = torch.randn(5, requires_grad=True)
    logp = (shared.sum() * torch.ones(24, 1)).clone()  # every response moves alike
    loss, _ = grpo.grpo_loss(logp, logp.detach(), adv.flatten(), torch.full((24, 1), 1 / 24))
    loss.backward()
    assert shared.grad.abs().max() < 1e-6


def test_a_group_weighs_most_where_half_of_it_is_right():
    """The weight of a group is largest where half of it is right."""
    for k in range(1, 8):
        rewards, p = tensor([[1.0] * k + [0.0] * (8 - k)]), k / 8
        population = math.sqrt(8 / 7)  # the unbiased std is larger by this
        close(
            grpo.group_advantages(rewards, 0.0).abs().sum().item(),
            16 * math.sqrt(p * (1 - p)) / population,
            1e-12,
        )


# --- what one step does to the distribution: sharpening, flattening, squeezing --------------------


def entropy(z):
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)


def pushed(z, y, adv, rate):
    """The logits after one on-policy step on token y."""
    y, adv = torch.tensor([y]), tensor([adv])
    return z - rate * grpo.logit_gradient(z[None], y, adv, z.log_softmax(-1)[y])[0]


def threshold(pi):
    """p*: the root of p (log p + H) = C above exp(-H), by bisection."""
    h = -(pi * pi.log()).sum().item()
    c = (pi.square() * (pi.log() + h)).sum().item()
    low, high = math.exp(-h), 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * (math.log(middle) + h) < c else (low, middle)
    return low


def test_the_entropy_law_is_the_gradient_of_the_entropy():
    """The entropy law is the gradient of the entropy by autograd."""
    z = torch.randn(4, 3, 9).requires_grad_()
    pi, y, step = z.detach().softmax(-1), torch.randint(9, (4, 3)), torch.randn(4, 3)
    [slope] = torch.autograd.grad(entropy(z).sum(), z)
    want = step * (slope * (F.one_hot(y, 9) - pi)).sum(-1)
    close(grpo.entropy_change(pi, y, step), want, 1e-14)


def test_the_entropy_follows_the_first_order_law():
    """The entropy follows the first-order law up to second order."""
    for adv in (1.0, -0.7):
        z, y = torch.randn(9), 3
        error = []
        for rate in (1e-2, 1e-3, 1e-4):
            law = grpo.entropy_change(z.softmax(-1), torch.tensor(y), tensor(rate * adv))
            error.append(abs(entropy(pushed(z, y, adv, rate)) - entropy(z) - law).item())
        assert 80 < error[0] / error[1] < 120 and 80 < error[1] / error[2] < 120


def test_p_star_is_lambert_s_formula_and_the_root_by_bisection():
    lambertw = pytest.importorskip("scipy.special").lambertw
    pi = (2 * torch.randn(300, 12)).softmax(-1)
    got = grpo.sharpening_threshold(pi)
    h = -(pi * pi.log()).sum(-1)
    c = (pi.square() * (pi.log() + h[:, None])).sum(-1)
    close(got, (tensor(lambertw((c * h.exp()).numpy()).real) - h).exp(), 1e-12)
    close(got[:30], tensor([threshold(row) for row in pi[:30]]), 1e-12)
    assert (got >= (-h).exp() - 1e-12).all() and (got <= pi.amax(-1) + 1e-12).all()


def test_the_entropy_turns_exactly_at_p_star():
    pi = (1.5 * torch.randn(400, 50)).softmax(-1)  # 20 000 tokens
    star = grpo.sharpening_threshold(pi)[:, None]
    every, up = torch.arange(50).expand(400, 50), torch.ones(400, 50)
    sharpens = grpo.entropy_change(pi[:, None].expand(-1, 50, -1), every, up) < 0
    assert torch.equal(sharpens, pi > star)
    assert 0.02 < sharpens.double().mean() < 0.5


def test_a_positive_advantage_sharpens_only_above_p_star():
    """A positive advantage flattens just below p*. It sharpens just above p*."""
    rest = tensor([0.5, 0.25, 0.15, 0.1])

    def distribution(p):
        return torch.cat([tensor([p]), (1 - p) * rest])

    low, high = 0.2, 0.6  # the token is below its threshold at 0.2 and above it at 0.6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (
            (low, middle)
            if middle > grpo.sharpening_threshold(distribution(middle))
            else (middle, high)
        )
    for offset, sharpens in ((-1e-4, False), (1e-4, True)):
        z = distribution(low + offset).log()
        for adv in (1.0, -1.0):
            changed = entropy(pushed(z, 0, adv, 1e-6)) < entropy(z)
            assert changed.item() is (sharpens == (adv > 0))


def test_rewarding_the_likeliest_token_lowers_the_entropy():
    """A positive advantage on the likeliest token lowers the entropy. A negative one raises it."""
    for _ in range(50):
        z = 2 * torch.randn(20)
        y = int(z.argmax())
        assert entropy(pushed(z, y, 1.0, 1e-5)) < entropy(z) < entropy(pushed(z, y, -1.0, 1e-5))


def test_counter_example_rewarding_a_rare_token_raises_entropy():
    """A positive advantage below one over the perplexity raises the entropy."""
    found = 0
    for _ in range(50):
        z = 2 * torch.randn(20)
        for y in (z.softmax(-1) < (-entropy(z)).exp()).nonzero().flatten().tolist():
            found += 1
            assert entropy(pushed(z, y, -1.0, 1e-5)) < entropy(z) < entropy(pushed(z, y, 1.0, 1e-5))
    assert found > 100


def test_counter_example_by_hand_only_the_likeliest_is_fed():
    """A negative advantage on a rare token feeds only the likeliest."""
    z = tensor([0.6, 0.2, 0.1, 0.05, 0.03, 0.01, 0.006, 0.004]).log()
    after = pushed(z, 7, -1.0, 0.5).softmax(-1)
    assert (after > z.softmax(-1)).tolist() == [True] + [False] * 7
    assert round(entropy(z).item(), 4) == 1.2125 and round(entropy(after.log()).item(), 4) == 1.0950
    # a positive one on the second likeliest
    assert round(entropy(pushed(z, 1, 1.0, 0.5)).item(), 4) == 1.3173


def test_counter_example_negative_steps_end_in_certainty():
    """Two hundred negative steps make a distribution certain, even on the likeliest token. It
    flattens at first, as the paper says; followed further it collapses on the runner-up."""
    z = tensor([0.6, 0.2, 0.1, 0.05, 0.03, 0.01, 0.006, 0.004]).log()
    rare, likely, path = z, z, []
    for _ in range(200):
        rare, likely = pushed(rare, 7, -1.0, 0.5), pushed(likely, 0, -1.0, 0.5)
        path.append(entropy(likely).item())
    assert path[0] > entropy(z) and max(path) > 1.3
    assert entropy(rare) < 1e-3 and rare.argmax() == 0
    assert path[-1] < 1e-3 and likely.argmax() == 1


def test_a_uniform_distribution_s_entropy_does_not_move():
    """The entropy of a uniform distribution does not move to first order."""
    uniform = torch.full((8,), 1 / 8)
    close(grpo.sharpening_threshold(uniform), 1 / 8, 1e-15)
    close(grpo.entropy_change(uniform, torch.tensor(3), tensor(1.0)), 0.0, 1e-16)
    z = torch.zeros(8)
    assert entropy(pushed(z, 3, 1.0, 0.1)) < entropy(z) > entropy(pushed(z, 3, -1.0, 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_and_uniform_distributions_give_no_nan(dtype):
    """Certain and uniform distributions give no NaN in value or gradient."""
    logits = torch.zeros(3, 6, dtype=dtype)
    logits[1, 2], logits[2] = (
        1e4,
        torch.linspace(-300, 0, 6),
    )  # certain; probabilities below the smallest number
    leaf = logits.requires_grad_()
    pi, y = leaf.softmax(-1), torch.tensor([0, 2, 0])
    star, change = (
        grpo.sharpening_threshold(pi),
        grpo.entropy_change(pi, y, torch.ones(3, dtype=dtype)),
    )
    assert star.dtype == change.dtype == dtype and star.isfinite().all() and change.isfinite().all()
    close(star[1].item(), 1.0)
    close(change[1].item(), 0.0)
    (star.sum() + change.sum()).backward()
    assert leaf.grad.isfinite().all()


def test_threshold_and_law_are_differentiable():
    z = torch.randn(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: grpo.sharpening_threshold(z.softmax(-1)), z)
    y, step = (
        torch.tensor([1, 4]),
        torch.tensor([0.3, -2.0], dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(
        lambda z, s: grpo.entropy_change(z.softmax(-1), y, s), (z, step)
    )


@pytest.mark.parametrize("adv", [1.0, -1.0])
def test_the_probabilities_follow_the_squeezing_law(adv):
    z, y, rate = torch.randn(10), 4, 1e-4
    pi = z.softmax(-1)
    moved = pushed(z, y, adv, rate).log_softmax(-1) - z.log_softmax(-1)
    law = rate * adv * (F.one_hot(torch.tensor(y), 10) - pi - (pi[y] - pi.square().sum()))
    close(moved, law, 1e-7)
    assert moved[y] * adv > 0
    if adv < 0:  # not every token that was not sampled gains, but the likeliest gains most
        others = [v for v in range(10) if v != y]
        assert max(others, key=lambda v: moved[v]) == max(others, key=lambda v: pi[v])


def test_the_expected_entropy_change_is_minus_a_covariance():
    """The expected on-policy entropy change is minus the covariance of advantage and s."""
    z, adv = torch.randn(9), torch.randn(9)
    pi, every = z.softmax(-1), torch.arange(9)
    h = entropy(z)
    s = pi * (pi.log() + h)
    covariance = (pi * adv * s).sum() - (pi * adv).sum() * (pi * s).sum()
    close((pi * grpo.entropy_change(pi.expand(9, 9), every, adv)).sum(), -covariance, 1e-14)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, names",
    [
        (
            lambda: grpo.clipped_surrogate(torch.zeros(3, 4), torch.zeros(4, 3), torch.zeros(3)),
            "old_logp",
        ),
        (
            lambda: grpo.clipped_surrogate(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4)),
            "adv",
        ),
        (
            lambda: grpo.clipped_surrogate(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 4)),
            "adv",
        ),
        (
            lambda: grpo.grpo_loss(
                *[torch.zeros(3, 4)] * 2, 1.0, torch.ones(3, 4), torch.zeros(3, 1), 0.1
            ),
            "ref_logp",
        ),
        (lambda: grpo.kl_penalty(torch.zeros(3, 4), torch.zeros(3, 1)), "ref_logp"),
        (
            lambda: grpo.grpo_loss(
                torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3), torch.ones(3)
            ),
            "mask",
        ),
        (
            lambda: grpo.grpo_loss(
                *[torch.zeros(3, 4)] * 2, torch.zeros(3), torch.ones(3, 4), beta=0.1
            ),
            "ref_logp",
        ),
        (
            lambda: grpo.logit_gradient(torch.zeros(4), torch.tensor(1), *[torch.zeros(())] * 2),
            "logits",
        ),
        (
            lambda: grpo.logit_gradient(
                torch.zeros(2, 4), torch.tensor([1]), *[torch.zeros(2)] * 2
            ),
            "target",
        ),
        (
            lambda: grpo.logit_gradient(
                torch.zeros(1, 4), torch.tensor([1]), *[torch.zeros(1)] * 2, beta=1.0
            ),
            "ref_logp",
        ),
        (lambda: grpo.group_advantages(torch.zeros(4)), "rewards"),
        (lambda: grpo.sequence_weights(torch.zeros(4), "sequence", 1, 1, 1), "mask"),
    ],
)
def test_a_wrong_shape_is_one_sentence_that_names_the_argument(call, names):
    with pytest.raises(ValueError, match=names):
        call()


# --- nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_norm", ["sequence", "token", "constant"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_a_loss_over_nothing_is_0_and_has_gradient_0(loss_norm, shape):
    logp = torch.zeros(shape, requires_grad=True)
    nothing = logp.detach(), torch.zeros(shape[0]), torch.zeros(shape), logp.detach()
    loss, stats = grpo.grpo_loss(logp, *nothing, beta=0.1, loss_norm=loss_norm)
    loss.backward()
    assert loss == 0 and logp.grad.shape == shape and stats["kl"].shape == shape


def test_no_prompt_and_no_position_give_empty_tables():
    none = torch.zeros(0, 3)
    assert (
        grpo.total_reward({"a": none}, {"a": 1.0}).shape
        == grpo.group_advantages(none).shape
        == (0, 3)
    )
    row = torch.zeros(0)
    assert grpo.logit_gradient(none, row.long(), row, row).shape == (0, 3)
    assert (
        grpo.entropy_change(none, row.long(), 1.0).shape
        == grpo.sharpening_threshold(none).shape
        == (0,)
    )
    for kind in grpo.KL_KINDS:
        assert grpo.kl_penalty(none, none, kind).shape == (0, 3)
    with pytest.raises(ValueError, match=r"\[B, G\] with G > 1"):
        grpo.group_advantages(torch.zeros(3, 0))
