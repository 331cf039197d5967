"""grpo.py: Eq. 1 against numbers by hand, Python loops, autograd and exact enumeration over a small vocabulary."""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from conftest import close, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo

NAN = float("nan")
pytestmark = pytest.mark.usefixtures("double_and_seeded")
exact = settings(derandomize=True, deadline=None, max_examples=60)


# --- group_advantages ------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    # mean 1, unbiased std sqrt(2/3) = 0.81649658, eps 1e-4
    close(grpo.group_advantages(tensor([[0, 1, 1, 2]])), tensor([[-1.2245949, 0, 0, 1.2245949]]), 1e-7)
    # 4 of 8 right: the unbiased std gives 0.9352, the population std would give 1
    half = grpo.group_advantages(tensor([[1] * 4 + [0] * 4]))
    close(half, tensor([[0.9352394] * 4 + [-0.9352394] * 4]), 1e-7)


def test_eps_is_added_to_the_std_and_is_1e_4():
    # std sqrt(2) 1e-4: with eps inside the root, or none, the numbers would be far off
    close(grpo.group_advantages(tensor([[0, 2e-4]])), tensor([[-1, 1]]) / (math.sqrt(2) + 1), 1e-9)
    close(grpo.group_advantages(tensor([[0, 2.0]]), eps=1.0), tensor([[-1, 1]]) / (math.sqrt(2) + 1), 1e-12)


@exact
@given(st.lists(st.lists(st.floats(-3, 3), min_size=5, max_size=5), min_size=1, max_size=4))
def test_advantages_equal_the_python_loop_group_by_group_and_sum_to_zero(rows):
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


def test_rounding_noise_in_a_tied_group_does_not_become_an_advantage():
    rewards = torch.tensor([[0.3, 0.1 + 0.2, 0.3, 0.3], [1.0, 1.0 + 1.2e-7, 1.0, 1.0]], dtype=torch.float32)
    assert rewards[1, 0] != rewards[1, 1]
    assert grpo.group_advantages(rewards).abs().max() < 2e-3  # without eps it would be 1.5
    noisy = tensor([[0.3, 0.1 + 0.2, 0.3, 0.3]])
    assert noisy[0, 0] != noisy[0, 1]
    assert grpo.group_advantages(noisy).abs().max() < 1e-9


def test_an_unknown_reward_leaves_the_statistics_and_gets_advantage_zero():
    got = grpo.group_advantages(tensor([[0, NAN, 1, 1, NAN, 2], [3, 4, 5, 6, 7, 8]]))
    known = grpo.group_advantages(tensor([[0, 1, 1, 2]]))[0]
    close(got[0, [0, 2, 3, 5]], known, 1e-14)
    assert torch.equal(got[0, [1, 4]], torch.zeros(2))
    close(got[1], grpo.group_advantages(tensor([[3, 4, 5, 6, 7, 8]]))[0], 1e-14)  # the other group does not notice


def test_groups_with_nothing_to_compare_get_zero_and_no_nan():
    got = grpo.group_advantages(tensor([[NAN] * 4, [NAN, 2, NAN, NAN], [0.1, NAN, 0.1, 0.1]]))
    assert torch.equal(got, torch.zeros(3, 4))


@pytest.mark.parametrize("shape", [(4, 1), (4, 0), (8,), (2, 2, 2)])
def test_a_group_of_one_and_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="G > 1"):
        grpo.group_advantages(torch.zeros(shape))


def test_advantages_ignore_a_shift_of_the_rewards_and_follow_a_permutation():
    rewards, order = torch.randn(3, 6), torch.randperm(6)
    adv = grpo.group_advantages(rewards)
    close(grpo.group_advantages(rewards + 7), adv, 1e-12)
    close(grpo.group_advantages(rewards[:, order]), adv[:, order], 1e-14)
    assert not torch.allclose(adv[0], grpo.group_advantages(rewards.view(1, -1))[0, :6])  # group, not batch


# --- total_reward ----------------------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_by_name_and_not_by_position():
    components = {"caption": tensor([[0, 1]]), "accuracy": tensor([[1, 0]]), "format": tensor([[1, 1]])}
    total = grpo.total_reward(components, {"accuracy": 1.0, "format": 0.1, "caption": 0.5})
    close(total, tensor([[1.1, 0.6]]), 1e-15)


def test_an_unknown_component_takes_its_own_mean_over_its_own_group():
    caption = tensor([[1, NAN, 0, 1], [NAN, NAN, 0, 0], [NAN, NAN, NAN, NAN]])
    accuracy = tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    total = grpo.total_reward({"accuracy": accuracy, "caption": caption}, {"accuracy": 1.0, "caption": 2.0})
    third = 2 / 3
    close(total, tensor([[3, 1 + 2 * third, 0, 2], [1, 1, 0, 0], [1, 1, 0, 0]]), 1e-15)


def test_an_unknown_component_neither_rewards_nor_punishes_whereas_zero_would_punish():
    caption = tensor([[1, NAN, 1, 1]])
    rewards = grpo.total_reward({"caption": caption}, {"caption": 1.0})
    assert torch.equal(grpo.group_advantages(rewards), torch.zeros(1, 4))
    assert grpo.group_advantages(caption.nan_to_num(0.0))[0, 1] < -1


def test_a_component_without_a_weight_is_an_error():
    with pytest.raises(KeyError):
        grpo.total_reward({"caption": tensor([[0, 1]])}, {"accuracy": 1.0})


# --- clipped_surrogate -----------------------------------------------------------------------------------------------


def surrogate_loop(logp, old, adv, low, high):
    rows = []
    for i, a in enumerate(adv.tolist()):
        rho = [math.exp(x - y) for x, y in zip(logp[i].tolist(), old[i].tolist(), strict=True)]
        rows.append([min(r * a, min(max(r, 1 - low), 1 + high) * a) for r in rho])
    return tensor(rows)


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.4), (0.3, 0.05)])
def test_the_surrogate_equals_the_loop_over_tokens(low, high):
    logp, old, adv = torch.randn(6, 5), torch.randn(6, 5), tensor([2, 1, 0.3, -0.3, -1, -2])
    close(grpo.clipped_surrogate(logp, old, adv, low, high), surrogate_loop(logp, old, adv, low, high))
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
def test_the_gradient_is_exactly_zero_in_the_two_dead_zones_and_rho_a_elsewhere(adv, rho, value, slope):
    logp = tensor([[math.log(rho)]]).requires_grad_()
    surrogate = grpo.clipped_surrogate(logp, torch.zeros(1, 1), tensor([adv]))
    surrogate.sum().backward()
    close(surrogate.item(), value)
    assert logp.grad.item() == 0.0 if slope == 0 else abs(logp.grad.item() - slope) < 1e-12


def test_at_ratio_one_the_surrogate_is_the_advantage_and_its_gradient_is_reinforce_s():
    logits, adv = torch.randn(4, 3, 7, requires_grad=True), torch.randn(4)
    logp = logits.log_softmax(-1)[..., 2]
    surrogate = grpo.clipped_surrogate(logp, logp.detach(), adv)
    assert torch.equal(surrogate, adv[:, None].expand(4, 3))
    [ours] = torch.autograd.grad(surrogate.sum(), logits, retain_graph=True)
    [reinforce] = torch.autograd.grad((logp * adv[:, None]).sum(), logits)
    assert torch.equal(ours, reinforce)


# --- kl_penalty ------------------------------------------------------------------------------------------------------


def policies(vocabulary=12):
    """(z, log pi, log pi_ref) over a vocabulary small enough to enumerate."""
    z = torch.randn(vocabulary, requires_grad=True)
    return z, z.log_softmax(-1), torch.randn(vocabulary).log_softmax(-1)


def reverse_kl(logp, ref):  # KL(pi || pi_ref)
    return F.kl_div(ref, logp, log_target=True, reduction="sum")


def forward_kl(logp, ref):  # KL(pi_ref || pi)
    return F.kl_div(logp, ref, log_target=True, reduction="sum")


@pytest.mark.parametrize("kind, value", [("k1", 0.69314718), ("k2", 0.24022651), ("k3", 0.19314718)])
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
    assert got == pytest.approx(x * x / 2, rel=1e-4, abs=0)  # e^x - x - 1, written out, would lose every digit


def test_k1_and_k3_are_unbiased_for_the_reverse_kl_and_k2_is_not():
    _, logp, ref = policies()
    expected = {k: (logp.exp() * grpo.kl_penalty(logp[None], ref[None], k)[0]).sum().item() for k in grpo.KL_KINDS}
    kl = reverse_kl(logp, ref).item()
    for kind in ("k1", "k3", "rho_k3"):
        assert abs(expected[kind] - kl) < 1e-12
    assert abs(expected["k2"] - kl) > 1e-3
    assert abs(forward_kl(logp, ref).item() - kl) > 1e-3  # the two KLs can be told apart here


@pytest.mark.parametrize("kind", grpo.KL_KINDS)
def test_the_expected_gradient_of_each_estimator_in_the_loss_by_exact_enumeration(kind):
    z, logp, ref = policies()
    [reverse] = torch.autograd.grad(reverse_kl(logp, ref), z, retain_graph=True)
    [forward] = torch.autograd.grad(forward_kl(logp, ref), z, retain_graph=True)
    # every token as a sample, weighted with its probability, which is the sampler's and so carries no gradient
    expected = (logp.detach().exp() * grpo.kl_penalty(logp[:, None], ref[:, None], kind)[:, 0]).sum()
    [got] = torch.autograd.grad(expected, z)
    want = {"k1": torch.zeros_like(z), "k2": reverse, "rho_k3": reverse, "k3": forward}[kind]
    close(got, want, 1e-14)
    close(forward, (logp.exp() - ref.exp()).detach(), 1e-14)
    assert (reverse - forward).abs().max() > 1e-2 and reverse.abs().max() > 1e-2


def test_an_unknown_kl_kind_is_refused():
    with pytest.raises(ValueError, match="k4"):
        grpo.kl_penalty(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


# --- sequence_weights ------------------------------------------------------------------------------------------------


def ragged_mask(lengths, width):
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).double()


@pytest.mark.parametrize("norm, short, long", [("sequence", 0.05, 0.005), ("token", 1 / 110, 1 / 110)])
def test_weights_by_hand_for_lengths_10_and_100(norm, short, long):
    weights = grpo.sequence_weights(ragged_mask([10, 100], 128), norm, sequences=2, tokens=110, max_tokens=128)
    close(weights[0, :10], torch.full((10,), short), 1e-15)
    close(weights[1, :100], torch.full((100,), long), 1e-15)
    assert weights[0, 10:].abs().sum() == 0 and weights[1, 100:].abs().sum() == 0
    close(weights.sum().item(), 1.0)


def test_the_constant_norm_divides_by_the_longest_response_allowed():
    weights = grpo.sequence_weights(ragged_mask([10, 100], 128), "constant", sequences=2, tokens=110, max_tokens=512)
    close(weights, ragged_mask([10, 100], 128) / 1024, 1e-15)


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_a_response_without_tokens_weighs_nothing_and_a_boolean_mask_will_do(norm):
    mask = ragged_mask([0, 3], 4)
    weights = grpo.sequence_weights(mask, norm, 2, 3, 4)
    assert weights.isfinite().all() and weights[0].abs().sum() == 0 and weights[1, 0] > 0
    assert torch.equal(grpo.sequence_weights(mask.bool(), norm, 2, 3, 4), weights)
    assert torch.equal(grpo.sequence_weights(mask.long(), norm, 2, 3, 4), weights)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="mean"):
        grpo.sequence_weights(torch.ones(1, 1), "mean", 1, 1, 1)


# --- grpo_loss -------------------------------------------------------------------------------------------------------


def batch(n=8, width=6, vocabulary=5):
    """Logits of n ragged responses, what was sampled, and everything the loss needs."""
    logits = torch.randn(n, width, vocabulary, requires_grad=True)
    y = torch.randint(vocabulary, (n, width))
    mask = ragged_mask(torch.randint(1, width + 1, (n,)).tolist(), width)
    logp = logits.log_softmax(-1).gather(-1, y[..., None])[..., 0]
    old, ref = logp.detach() + 0.3 * torch.randn(n, width), logp.detach() + 0.5 * torch.randn(n, width)
    return logits, logp, old, ref, torch.randn(n), mask


def loss_loop(logp, old, ref, adv, mask, norm, beta, kind, max_tokens, low=0.2, high=0.2):
    """Eq. 1 the slow way: a Python number."""
    surrogate, total, n = surrogate_loop(logp, old, adv, low, high), 0.0, len(logp)
    for i in range(n):
        length = int(mask[i].sum())
        for t in range(length):
            x = ref[i, t].item() - logp[i, t].item()
            kl = {"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - x - 1, "rho_k3": math.exp(x) - x - 1}[kind]
            size = {"sequence": n * length, "token": mask.sum().item(), "constant": n * max_tokens}[norm]
            total += (-surrogate[i, t].item() + beta * kl) / size
    return total


@pytest.mark.parametrize("kind", grpo.KL_KINDS)
@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_the_loss_equals_eq_1_written_as_a_loop(norm, kind):
    _, logp, old, ref, adv, mask = batch()
    weights = grpo.sequence_weights(mask, norm, 8, mask.sum().item(), 10)
    loss, _ = grpo.grpo_loss(logp, old, adv, weights, ref, 0.3, 0.1, 0.4, kind)
    close(loss.item(), loss_loop(logp, old, ref, adv, mask, norm, 0.3, kind, 10, 0.1, 0.4))
    assert loss.ndim == 0


def test_without_beta_there_is_no_kl_and_the_reference_does_not_matter():
    _, logp, old, ref, adv, mask = batch()
    weights = grpo.sequence_weights(mask, "sequence", 8, mask.sum().item(), 6)
    plain, stats = grpo.grpo_loss(logp, old, adv, weights)
    assert stats["kl"] is None
    with_reference, stats = grpo.grpo_loss(logp, old, adv, weights, ref, 0.0)
    assert torch.equal(plain, with_reference) and stats["kl"] is None
    close(plain.item(), loss_loop(logp, old, ref, adv, mask, "sequence", 0.0, "k3", 6))


def test_the_defaults_are_k3_and_a_symmetric_clip_of_0_2():
    _, logp, old, ref, adv, mask = batch()
    weights = grpo.sequence_weights(mask, "sequence", 8, mask.sum().item(), 6)
    loss, _ = grpo.grpo_loss(logp, old, adv, weights, ref, 0.3)
    close(loss.item(), loss_loop(logp, old, ref, adv, mask, "sequence", 0.3, "k3", 6))


def test_the_ratio_is_taken_against_the_sampler_and_not_the_reference():
    logp, far = torch.full((1, 1), -1.0, requires_grad=True), torch.full((1, 1), -9.0)
    loss, stats = grpo.grpo_loss(logp, logp.detach(), tensor([1.0]), torch.ones(1, 1), far, beta=1e-9)
    loss.backward()
    assert abs(logp.grad.item() + 1) < 1e-5 and stats["clipped"].item() == 0  # rho = 1, though pi / pi_ref = e^8


def test_the_statistics_are_the_kl_per_token_without_gradient_and_the_dead_zones():
    _, logp, old, ref, adv, mask = batch()
    weights = grpo.sequence_weights(mask, "token", 8, mask.sum().item(), 6)
    _, stats = grpo.grpo_loss(logp, old, adv, weights, ref, 0.1, kl_kind="k2")
    close(stats["kl"][mask > 0], (ref - logp.detach()).square()[mask > 0] / 2, 1e-15)
    assert not stats["kl"].requires_grad and not stats["clipped"].requires_grad
    free = logp.detach().requires_grad_()
    grpo.grpo_loss(free, old, adv, torch.ones_like(mask), eps_low=0.1, eps_high=0.3)[0].backward()
    _, stats = grpo.grpo_loss(free, old, adv, torch.ones_like(mask), eps_low=0.1, eps_high=0.3)
    assert torch.equal(stats["clipped"].bool(), free.grad == 0)
    assert 0 < stats["clipped"].mean() < 1


def test_at_ratio_one_the_loss_is_about_zero_but_its_gradient_is_reinforce_s():
    logits, logp, _, _, _, mask = batch()
    adv = grpo.group_advantages(torch.randn(2, 4)).flatten()
    weights = grpo.sequence_weights(mask, "sequence", 8, mask.sum().item(), 6)
    loss, _ = grpo.grpo_loss(logp, logp.detach(), adv, weights)
    assert abs(loss.item()) < 1e-14
    [ours] = torch.autograd.grad(loss, logits, retain_graph=True)
    [reinforce] = torch.autograd.grad(-(weights * adv[:, None] * logp).sum(), logits)
    close(ours, reinforce, 1e-16)
    assert ours.norm() > 0.05


def test_equal_rewards_give_exactly_no_gradient():
    logits, logp, _, _, _, mask = batch()
    adv = grpo.group_advantages(torch.full((2, 4), 1.1)).flatten()
    weights = grpo.sequence_weights(mask, "sequence", 8, mask.sum().item(), 6)
    grpo.grpo_loss(logp, logp.detach(), adv, weights)[0].backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_micro_batches_of_any_size_give_the_same_loss_and_gradient_with_global_counts(norm):
    logits, logp, old, ref, adv, mask = batch()

    def accumulated(size, local=False):
        grad, total = torch.zeros_like(logits), 0.0
        for rows in torch.arange(8).split(size):
            sequences, tokens = (len(rows), mask[rows].sum().item()) if local else (8, mask.sum().item())
            weights = grpo.sequence_weights(mask[rows], norm, sequences, tokens, 6)
            loss, _ = grpo.grpo_loss(logp[rows], old[rows], adv[rows], weights, ref[rows], 0.2)
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
def test_padding_may_hold_anything_and_changes_neither_loss_nor_gradient(where, garbage):
    _, logp, old, ref, adv, mask = batch()
    weights = grpo.sequence_weights(mask, "sequence", 8, mask.sum().item(), 6)
    clean = {"logp": logp.detach(), "old": old, "ref": ref}
    dirty = {**clean, where: torch.where(mask > 0, clean[where], garbage)}

    def run(values, beta, kind):
        leaf = values["logp"].clone().requires_grad_()
        loss, _ = grpo.grpo_loss(leaf, values["old"], adv, weights, values["ref"], beta, kl_kind=kind)
        loss.backward()
        return loss.detach(), leaf.grad

    assert (mask == 0).any()
    for beta, kind in [(0.0, "k3"), *((0.2, kind) for kind in grpo.KL_KINDS)]:
        (loss, grad), (dirty_loss, dirty_grad) = run(clean, beta, kind), run(dirty, beta, kind)
        assert torch.equal(loss, dirty_loss)
        assert torch.equal(dirty_grad[mask > 0], grad[mask > 0]) and grad.abs().sum() > 0
        assert torch.equal(dirty_grad[mask == 0], torch.zeros_like(grad[mask == 0])), kind


def test_one_step_down_the_loss_favours_good_tokens_and_pulls_towards_the_reference():
    z = torch.zeros(2, 5, requires_grad=True)
    logp = z.log_softmax(-1)[:, :1]
    grpo.grpo_loss(logp, logp.detach(), tensor([1.0, -1.0]), torch.ones(2, 1))[0].backward()
    after = (z - 0.1 * z.grad).softmax(-1)[:, 0]
    assert after[0] > 0.2 > after[1]

    z, logp, ref = policies()
    weights = logp.detach().exp()[:, None]  # every token once, weighted with its probability
    loss, _ = grpo.grpo_loss(logp[:, None], logp.detach()[:, None], torch.zeros(12), weights, ref[:, None], beta=1.0)
    loss.backward()
    closer = (z - 0.1 * z.grad).log_softmax(-1)
    assert forward_kl(closer, ref) < forward_kl(logp, ref) and reverse_kl(closer, ref) < reverse_kl(logp, ref)


# --- what one step does to the distribution: sharpening, flattening, squeezing ---------------------------------------


def logit_gradient(z, y, adv, old=None, ref=None, beta=0.0, kind="k3"):
    """dL/dz of one token through grpo_loss and autograd."""
    z = z.detach().clone().requires_grad_()
    logp = z.log_softmax(-1)[y].view(1, 1)
    old = logp.detach() if old is None else old.view(1, 1)
    ref = None if ref is None else ref.view(1, 1)
    loss, _ = grpo.grpo_loss(logp, old, tensor([adv]), torch.ones(1, 1), ref, beta, kl_kind=kind)
    return torch.autograd.grad(loss, z)[0]


def entropy(z):
    return -(z.softmax(-1) * z.log_softmax(-1)).sum()


def entropy_change(z, y, adv, rate=1e-5):
    return (entropy(z - rate * logit_gradient(z, y, adv)) - entropy(z)).item() / rate


def collision(pi):
    """H and C = sum_v pi_v^2 (log pi_v + H) of a distribution."""
    h = -(pi * pi.log()).sum()
    return h, (pi.square() * (pi.log() + h)).sum()


def threshold(pi):
    """p*: the root of p (log p + H) = C above exp(-H), by bisection."""
    h, c = (x.item() for x in collision(pi))
    low, high = math.exp(-h), 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * (math.log(middle) + h) < c else (low, middle)
    return low


def test_the_logit_gradient_is_the_closed_form_dead_zones_included():
    dead = 0
    for _ in range(300):
        z, ref_z, y = torch.randn(7), torch.randn(7), int(torch.randint(7, ()))
        pi, pi_ref, adv, beta = z.softmax(-1), ref_z.softmax(-1), torch.randn(()).item(), 0.3
        old = z.log_softmax(-1)[y] + 0.4 * torch.randn(())
        rho = (pi[y].log() - old).exp().item()
        g = 0.0 if (adv > 0 and rho > 1.2) or (adv < 0 and rho < 0.8) else 1.0
        dead += g == 0
        residual = F.one_hot(torch.tensor(y), 7) - pi  # e_y - pi
        want = (-g * rho * adv + beta * (1 - pi_ref[y] / pi[y])) * residual
        close(logit_gradient(z, y, adv, old, ref_z.log_softmax(-1)[y], beta), want, 1e-13)
    assert 30 < dead < 270


def test_a_positive_advantage_on_the_likeliest_token_lowers_the_entropy_and_a_negative_one_raises_it():
    for _ in range(50):
        z = 2 * torch.randn(20)
        assert entropy_change(z, int(z.argmax()), 1.0) < 0
        assert entropy_change(z, int(z.argmax()), -1.0) > 0


def test_counter_example_below_one_over_the_perplexity_a_positive_advantage_raises_the_entropy():
    found = 0
    for _ in range(50):
        z = 2 * torch.randn(20)
        for y in (z.softmax(-1) < (-entropy(z)).exp()).nonzero().flatten().tolist():
            found += 1
            assert entropy_change(z, y, 1.0) > 0
            assert entropy_change(z, y, -1.0) < 0
    assert found > 100


def test_counter_example_by_hand_a_negative_advantage_on_a_rare_token_feeds_only_the_likeliest():
    z = tensor([0.6, 0.2, 0.1, 0.05, 0.03, 0.01, 0.006, 0.004]).log()
    after = (z - 0.5 * logit_gradient(z, 7, -1.0)).softmax(-1)
    assert (after > z.softmax(-1)).tolist() == [True] + [False] * 7
    assert round(entropy(z).item(), 4) == 1.2125 and round(entropy(after.log()).item(), 4) == 1.0950
    raised = z - 0.5 * logit_gradient(z, 1, 1.0)  # a positive one on the second likeliest
    assert round(entropy(raised).item(), 4) == 1.3173


def test_the_entropy_follows_the_first_order_law_up_to_second_order():
    for adv in (1.0, -0.7):
        z, y = torch.randn(9), 3
        pi = z.softmax(-1)
        h, c = collision(pi)
        gradient = logit_gradient(z, y, adv)
        slope = -adv * (pi[y] * (pi[y].log() + h) - c)
        error = [abs(entropy(z - rate * gradient) - entropy(z) - rate * slope).item() for rate in (1e-2, 1e-3, 1e-4)]
        assert 80 < error[0] / error[1] < 120 and 80 < error[1] / error[2] < 120


def test_the_entropy_turns_exactly_at_p_star_which_lies_between_one_over_perplexity_and_the_maximum():
    sides = [0, 0]
    for _ in range(60):
        z = 1.5 * torch.randn(15)
        pi = z.softmax(-1)
        star = threshold(pi)
        assert (-entropy(z)).exp() - 1e-12 <= star <= pi.max() + 1e-12
        leaf = z.clone().requires_grad_()
        [slope] = torch.autograd.grad(entropy(leaf), leaf)
        for y in range(15):
            sharpens = (slope @ -logit_gradient(z, y, 1.0)).item() < 0
            assert sharpens == (pi[y].item() > star)
            sides[sharpens] += 1
    assert min(sides) > 50


def test_just_below_p_star_a_positive_advantage_flattens_and_just_above_it_sharpens():
    rest = tensor([0.5, 0.25, 0.15, 0.1])

    def distribution(p):
        return torch.cat([tensor([p]), (1 - p) * rest])

    low, high = 0.2, 0.6  # the token is below its threshold at 0.2 and above it at 0.6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if middle > threshold(distribution(middle)) else (middle, high)
    for offset, sharpens in ((-1e-4, False), (1e-4, True)):
        z = distribution(low + offset).log().requires_grad_()
        [slope] = torch.autograd.grad(entropy(z), z)
        assert ((slope @ -logit_gradient(z, 0, 1.0)).item() < 0) is sharpens


def test_of_a_uniform_distribution_the_entropy_does_not_move_to_first_order():
    assert abs(entropy_change(torch.zeros(8), 3, 1.0, rate=1e-4)) < 1e-3
    assert entropy_change(torch.zeros(8), 3, 1.0, rate=1e-1) < 0 > entropy_change(torch.zeros(8), 3, -1.0, rate=1e-1)


@pytest.mark.parametrize("adv", [1.0, -1.0])
def test_the_probabilities_follow_the_squeezing_law(adv):
    z, y, rate = torch.randn(10), 4, 1e-4
    pi = z.softmax(-1)
    moved = (z - rate * logit_gradient(z, y, adv)).log_softmax(-1) - z.log_softmax(-1)
    law = rate * adv * (F.one_hot(torch.tensor(y), 10) - pi - (pi[y] - pi.square().sum()))
    close(moved, law, 1e-7)
    assert moved[y] * adv > 0
    if adv < 0:  # not every token that was not sampled gains, but the likeliest gains most
        others = [v for v in range(10) if v != y]
        assert max(others, key=lambda v: moved[v]) == max(others, key=lambda v: pi[v])


def test_the_expected_on_policy_entropy_change_is_minus_the_covariance_of_advantage_and_surprise():
    z, adv = torch.randn(9), torch.randn(9)
    pi = z.softmax(-1)
    adv = adv - (pi * adv).sum()
    gradient = sum(pi[y] * logit_gradient(z, y, adv[y].item()) for y in range(9))
    h, _ = collision(pi)
    s = pi * (pi.log() + h)
    covariance = (pi * adv * s).sum() - (pi * adv).sum() * (pi * s).sum()
    rate = 1e-6
    close((entropy(z - rate * gradient) - entropy(z)) / rate, -covariance, 1e-5)
