"""ntk_infonce.py: Eq. 4 against autograd on a real linear head, F.cross_entropy and loops; and what it does not do."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import close, tensor
from torch import nn

from ntk_infonce import gradient_cosine, info_nce

NAN = float("nan")
pytestmark = pytest.mark.usefixtures("double_and_seeded")


# --- gradient_cosine -------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A body and an LM head: what f_i is the gradient of, for real."""

    def __init__(self, inputs=4, d=5, vocabulary=11, bias=False):
        super().__init__()
        self.body, self.head = nn.Linear(inputs, d), nn.Linear(d, vocabulary, bias=bias)

    def forward(self, x):
        hidden = self.body(x).tanh()
        return hidden, self.head(hidden)


def sample(lengths, inputs=4, vocabulary=11):
    """Tokens of several samples laid flat: inputs, targets, segment."""
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return torch.randn(len(segment), inputs), torch.randint(vocabulary, (len(segment),)), segment


def head_gradients(model, x, targets, segment, n, create_graph=False):
    """f_i = grad_W log pi(y_i | x_i), one autograd call a sample.   -> [n, V d]"""
    _, logits = model(x)
    logp = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    grads = [torch.autograd.grad(logp[segment == i].sum(), model.head.weight, create_graph=True)[0] for i in range(n)]
    rows = torch.stack([g.flatten() for g in grads])
    return rows if create_graph else rows.detach()


def cosines(rows):
    return F.cosine_similarity(rows[:, None], rows[None], dim=-1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 4, 2], [7, 5]])
def test_the_cosine_is_that_of_the_autograd_gradients_of_a_real_head(lengths, bias):
    model, (x, y, segment), n = Model(bias=bias), sample(lengths), len(lengths)
    got = gradient_cosine(*model(x), y, segment, n)
    close(got, cosines(head_gradients(model, x, y, segment, n)), 1e-10)
    assert got.shape == (n, n) and got.detach().triu(1).abs().max() > 0.01


def test_its_own_gradient_is_the_double_backward_through_head_and_body():
    model, (x, y, segment) = Model(), sample([3, 1, 4, 2])
    coefficients = torch.randn(4, 4)
    parameters = list(model.parameters())
    got = torch.autograd.grad((coefficients * gradient_cosine(*model(x), y, segment, 4)).sum(), parameters)
    rows = head_gradients(model, x, y, segment, 4, create_graph=True)
    want = torch.autograd.grad((coefficients * cosines(rows)).sum(), parameters)
    for ours, theirs in zip(got, want, strict=True):
        close(ours, theirs, 1e-10)
    assert want[0].norm() > 0.1 and want[2].norm() > 0.1


def test_a_hand_computed_pair():
    # V = 2, uniform pi, d = 1: r = (1/2, -1/2) for y = 0 and (-1/2, 1/2) for y = 1; f = r h
    hidden, logits = tensor([[2], [3], [1]]), torch.zeros(3, 2)
    got = gradient_cosine(hidden, logits, torch.tensor([0, 1, 0]), torch.arange(3), 3)
    close(got, tensor([[1, -1, 1], [-1, 1, -1], [1, -1, 1]]))
    orthogonal = gradient_cosine(torch.eye(3), logits, torch.tensor([0, 1, 0]), torch.arange(3), 3)
    close(orthogonal, torch.eye(3))


def test_the_matrix_is_symmetric_with_a_unit_diagonal_and_positive_semidefinite():
    model, (x, y, segment) = Model(), sample([3, 1, 4, 2, 5])
    got = gradient_cosine(*model(x), y, segment, 5).detach()
    close(got, got.T, 1e-14)
    close(got.diagonal(), torch.ones(5), 1e-14)
    assert torch.linalg.eigvalsh(got).min() > -1e-12 and got.abs().max() <= 1 + 1e-12


def test_permuting_the_samples_permutes_the_cosines_and_the_order_of_the_tokens_does_not_matter():
    model, (x, y, segment) = Model(), sample([3, 1, 4, 2])
    hidden, logits = (t.detach() for t in model(x))
    got = gradient_cosine(hidden, logits, y, segment, 4)
    order = torch.tensor([2, 0, 3, 1])
    renamed = gradient_cosine(hidden, logits, y, order.argsort()[segment], 4)
    close(renamed, got[order][:, order], 1e-14)
    tokens = torch.randperm(10)
    close(gradient_cosine(hidden[tokens], logits[tokens], y[tokens], segment[tokens], 4), got, 1e-14)


def test_a_sample_s_cosines_do_not_depend_on_who_else_is_in_the_batch():
    model, (x, y, segment) = Model(), sample([3, 1, 4, 2])
    hidden, logits = model(x)
    first = segment < 2
    pair = gradient_cosine(hidden[first], logits[first], y[first], segment[first], 2)
    close(pair, gradient_cosine(hidden, logits, y, segment, 4)[:2, :2], 1e-14)


def test_scaling_the_hidden_states_or_repeating_the_tokens_of_a_sample_changes_nothing():
    model, (x, y, segment) = Model(), sample([3, 1, 4])
    hidden, logits = (t.detach() for t in model(x))
    got = gradient_cosine(hidden, logits, y, segment, 3)
    scale = tensor([10, 0.01, 3])[segment][:, None]
    close(gradient_cosine(hidden * scale, logits, y, segment, 3), got, 1e-12)
    twice = torch.cat([torch.arange(8), torch.arange(3)])  # sample 0 two times
    close(gradient_cosine(hidden[twice], logits[twice], y[twice], segment[twice], 3), got, 1e-12)


def test_adding_a_constant_to_the_logits_changes_nothing_but_a_temperature_does():
    model, (x, y, segment) = Model(), sample([3, 1, 4])
    hidden, logits = (t.detach() for t in model(x))
    got = gradient_cosine(hidden, logits, y, segment, 3)
    close(gradient_cosine(hidden, logits + 5, y, segment, 3), got, 1e-12)
    assert (gradient_cosine(hidden, logits / 0.2, y, segment, 3) - got).abs().max() > 1e-2


def test_a_sample_with_no_gradient_or_no_token_gives_zeros_and_no_nan():
    hidden = torch.randn(3, 4, requires_grad=True)
    logits = torch.zeros(3, 6)
    logits[0, 2] = 1e4  # certain of its target: the gradient of log pi is exactly zero
    logits.requires_grad_()
    got = gradient_cosine(hidden, logits, torch.tensor([2, 1, 3]), torch.tensor([0, 1, 2]), 4)
    assert torch.equal(got[0], torch.zeros(4)) and torch.equal(got[:, 3], torch.zeros(4))
    got.sum().backward()
    assert hidden.grad.isfinite().all() and logits.grad.isfinite().all() and hidden.grad[1:].abs().sum() > 0


def test_rows_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="one row per token"):
        gradient_cosine(torch.zeros(3, 2), torch.zeros(3, 4), torch.zeros(2).long(), torch.zeros(3).long(), 1)


def test_single_precision_is_good_to_six_digits():
    model, (x, y, segment) = Model(), sample([3, 1, 4, 2])
    hidden, logits = (t.detach() for t in model(x))
    single = gradient_cosine(hidden.float(), logits.float(), y, segment, 4)
    assert single.dtype == torch.float32
    close(single.double(), gradient_cosine(hidden, logits, y, segment, 4), 2e-6)


# --- info_nce --------------------------------------------------------------------------------------------------------

MIXED = tensor(  # every anchor has positives (<= 0.5) and negatives
    [[1.0, 0.9, 0.1, 0.4], [0.9, 1.0, 0.8, -0.3], [0.1, 0.8, 1.0, 0.7], [0.4, -0.3, 0.7, 1.0]]
)


def info_nce_loop(s, tau, temperature):
    """Eq. 4 one anchor at a time, with the anchors that lack positives or negatives left out."""
    losses = []
    for i in range(len(s)):
        others = [k for k in range(len(s)) if k != i]
        positives = [j for j in others if s[i, j] <= tau]
        if positives and len(positives) < len(others):
            top = sum(math.exp(s[i, j] / temperature) for j in positives)
            losses.append(-math.log(top / sum(math.exp(s[i, k] / temperature) for k in others)))
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.07])
@pytest.mark.parametrize("tau", [-0.9, -0.2, 0.0, 0.3, 0.54, 0.9])
def test_the_loss_equals_eq_4_written_as_a_loop(tau, temperature):
    s = (2 * torch.rand(7, 7) - 1).fill_diagonal_(1.0)
    close(info_nce(s, tau, temperature)[0].item(), info_nce_loop(s, tau, temperature))


def test_the_defaults_are_the_paper_s_threshold_and_no_temperature():
    s = MIXED.clone()
    s[0, 2:], s[1, 3] = tensor([0.539, 0.541]), 0.53
    close(info_nce(s)[0].item(), info_nce_loop(s, 0.54, 1.0))
    assert abs(info_nce_loop(s, 0.54, 1.0) - info_nce_loop(s, 0.5, 1.0)) > 0.01


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_with_one_positive_an_anchor_the_loss_is_cross_entropy(temperature):
    n, positive = 6, torch.tensor([3, 0, 5, 1, 2, 4])
    s = 0.6 + 0.3 * torch.rand(n, n)
    s[torch.arange(n), positive] = 0.5 * torch.rand(n)
    scores = (s / temperature).masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
    close(info_nce(s, 0.54, temperature)[0], F.cross_entropy(scores, positive), 1e-14)


def test_a_hand_computed_anchor():
    # only anchor 0 is active: positive 0.0, negative 1.0: log(1 + e)
    s = tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]])
    loss, stats = info_nce(s, 0.5)
    close(loss.item(), math.log(1 + math.e))
    assert stats["active"] == 1


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_gradient_is_q_minus_p_over_temperature_and_active_anchors(temperature):
    s = (2 * torch.rand(6, 6) - 1).fill_diagonal_(1.0)
    s[0, 1:] = 0.9  # no positive: left out
    s[1, [0, 2, 3, 4, 5]] = -0.9  # no negative: left out
    s.requires_grad_()
    info_nce(s, 0.2, temperature)[0].backward()
    off, want = ~torch.eye(6, dtype=torch.bool), torch.zeros(6, 6)
    for i in range(2, 6):
        positive = off[i] & (s[i] <= 0.2)
        assert 0 < positive.sum() < 5
        q = (s[i] / temperature).detach().masked_fill(~off[i], -torch.inf).softmax(-1)
        p = (s[i] / temperature).detach().masked_fill(~positive, -torch.inf).softmax(-1)
        want[i] = (q - p) / (temperature * 4)
    close(s.grad, want, 1e-14)
    assert torch.equal(s.grad.diagonal(), torch.zeros(6)) and torch.equal(s.grad[:2], torch.zeros(2, 6))


def test_the_dissimilar_are_pulled_closer_and_the_similar_pushed_away():
    s = MIXED.clone().requires_grad_()
    info_nce(s, 0.5)[0].backward()
    off = ~torch.eye(4, dtype=torch.bool)
    assert (s.grad[off & (MIXED <= 0.5)] < 0).all() and (s.grad[off & (MIXED > 0.5)] > 0).all()
    close(s.grad.sum(1), torch.zeros(4), 1e-15)  # it only redistributes within a row


def test_one_step_on_a_mixed_row_lowers_the_largest_negative_relative_to_the_mean_positive():
    s = MIXED.clone().requires_grad_()
    after = MIXED - 0.1 * torch.autograd.grad(info_nce(s, 0.5)[0], s)[0]
    for i in range(4):
        others = torch.arange(4) != i
        positive, negative = others & (MIXED[i] <= 0.5), others & (MIXED[i] > 0.5)
        assert (after[i][negative].max() - after[i][positive].mean()) < (
            MIXED[i][negative].max() - MIXED[i][positive].mean()
        )


def test_one_step_of_the_parameters_does_the_same_to_the_cosines_of_a_real_model():
    model, (x, y, segment) = Model(), sample([2] * 6, vocabulary=3)
    before = gradient_cosine(*model(x), y, segment, 6)
    loss, stats = info_nce(before, 0.2)
    parameters = list(model.parameters())
    with torch.no_grad():
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter -= 1e-4 * gradient  # small: no pair crosses tau, where the loss jumps
        after = gradient_cosine(*model(x), y, segment, 6)
    off = ~torch.eye(6, dtype=torch.bool)
    positive, negative = off & (before <= 0.2), off & (before > 0.2)
    active = [i for i in range(6) if positive[i].any() and negative[i].any()]

    def gap(s):
        return sum((s[i][negative[i]].max() - s[i][positive[i]].mean()).item() for i in active)

    assert stats["active"] == len(active) >= 3
    assert torch.equal(after <= 0.2, before <= 0.2)
    assert info_nce(after, 0.2)[0] < loss and gap(after) < gap(before)


@pytest.mark.parametrize("value", [-0.5, 0.3, 0.54, 0.6, 0.99])
def test_where_all_pairs_lie_on_one_side_of_tau_loss_and_gradient_are_exactly_zero(value):
    s = torch.full((5, 5), value).fill_diagonal_(1.0).requires_grad_()
    loss, stats = info_nce(s, 0.54)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(s.grad, torch.zeros(5, 5))
    assert stats["active"] == 0 and stats["positive"] == float(value <= 0.54)


def test_a_pair_exactly_at_tau_is_a_positive():
    s = tensor([[1, 0.5, 0.9], [0.5, 1, 0.9], [0.9, 0.9, 1]])
    assert info_nce(s, 0.5)[1]["positive"].item() == pytest.approx(2 / 6)
    assert info_nce(s, 0.5)[1]["active"] == 2
    assert info_nce(s, 0.4999)[1]["active"] == 0


@pytest.mark.parametrize("n", [0, 1, 2])
def test_batches_too_small_for_a_positive_and_a_negative_give_zero_and_no_nan(n):
    s = torch.full((n, n), 0.3).requires_grad_()
    loss, stats = info_nce(s)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(s.grad, torch.zeros(n, n))
    assert all(value.isfinite() for value in stats.values()) and stats["active"] == 0


def test_duplicates_give_a_finite_loss_and_finite_parameters():
    model, (x, y, segment) = Model(), sample([2, 2, 2])
    x, y, segment = torch.cat([x, x]), torch.cat([y, y]), torch.cat([segment, segment + 3])  # every sample twice
    cosine = gradient_cosine(*model(x), y, segment, 6)
    close(cosine[0, 3].item(), 1.0)
    loss, stats = info_nce(cosine, 0.54, 0.05)
    loss.backward()
    assert loss.isfinite() and loss > 0 and stats["active"] == 6
    assert all(p.grad.isfinite().all() for p in model.parameters()) and model.head.weight.grad.norm() > 0

    model.zero_grad()
    same = gradient_cosine(*model(x[:2].repeat(4, 1)), y[:2].repeat(4), torch.arange(4).repeat_interleave(2), 4)
    loss, stats = info_nce(same)
    loss.backward()
    assert loss.item() == 0.0 and stats["active"] == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("junk", [0.0, -1.0, 100.0, -1e6])
def test_the_diagonal_is_ignored_in_loss_gradient_and_statistics(junk):
    def run(s):
        s = s.clone().requires_grad_()
        loss, stats = info_nce(s, 0.5, 0.5)
        loss.backward()
        return [loss.detach(), s.grad, *stats.values()]

    for ours, theirs in zip(run(MIXED.clone().fill_diagonal_(junk)), run(MIXED), strict=True):
        assert torch.equal(ours, theirs)


def test_membership_is_decided_on_the_cosine_and_not_on_the_cosine_over_temperature():
    s = tensor([[1, 0.3, 0.7], [0.3, 1, 0.7], [0.3, 0.7, 1]])
    for temperature in (0.1, 1.0, 10.0):
        assert info_nce(s, 0.5, temperature)[1]["active"] == 3
        close(info_nce(s, 0.5, temperature)[0].item(), math.log1p(math.exp(0.4 / temperature)))


def test_membership_carries_no_gradient():
    """The loss jumps where a pair crosses tau; its gradient is that of the smooth part at either side."""
    for value in (0.5 - 1e-9, 0.5 + 1e-9):
        s = MIXED.clone()
        s[0, 3] = value
        s.requires_grad_()
        info_nce(s, 0.5)[0].backward()
        step, fixed = 1e-6, (s.detach() <= 0.5) & ~torch.eye(4, dtype=torch.bool)

        def smooth(at, fixed=fixed, s=s):  # the sets are held while one entry moves
            moved = s.detach().clone()
            moved[0, 3] = at
            top = moved.masked_fill(~fixed, -torch.inf).logsumexp(1)
            return (moved.fill_diagonal_(-torch.inf).logsumexp(1) - top).mean().item()

        slope = (smooth(value + step) - smooth(value - step)) / (2 * step)
        assert s.grad[0, 3].item() == pytest.approx(slope, abs=1e-8)
        assert (slope < 0) is (value < 0.5)


def test_full_gradient_flows_through_both_samples_of_a_pair():
    hidden = torch.randn(4, 5, requires_grad=True)
    logits = torch.randn(4, 7, requires_grad=True)
    cosine = gradient_cosine(hidden, logits, torch.tensor([0, 1, 2, 3]), torch.arange(4), 4)
    cosine[0, 1].backward()
    assert (hidden.grad.norm(dim=1) > 1e-3).tolist() == [True, True, False, False]
    assert (logits.grad.norm(dim=1) > 1e-3).tolist() == [True, True, False, False]


def test_the_statistics_describe_the_off_diagonal_pairs():
    _, stats = info_nce(MIXED, 0.5)
    off = MIXED[~torch.eye(4, dtype=torch.bool)]
    assert stats["active"] == 4 and stats["positive"].item() == pytest.approx(6 / 12)
    close(stats["cosine_mean"].item(), off.mean().item())
    close(stats["cosine_sd"].item(), off.var(correction=0).sqrt().item())
    leaf = MIXED.clone().requires_grad_()
    assert not any(value.requires_grad for value in info_nce(leaf, 0.5)[1].values())


@pytest.mark.parametrize("tau", [1.01, -1.01, NAN])
def test_a_threshold_that_is_no_cosine_is_refused(tau):
    with pytest.raises(ValueError, match="tau"):
        info_nce(MIXED, tau)


@pytest.mark.parametrize("shape", [(3, 4), (4,), (2, 2, 2)])
def test_a_matrix_that_is_not_square_is_refused(shape):
    with pytest.raises(ValueError, match="square"):
        info_nce(torch.zeros(shape))


def test_small_temperatures_do_not_overflow():
    s = MIXED.clone().float().requires_grad_()
    loss, _ = info_nce(s, 0.5, 1e-3)
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all() and loss > 100


# --- documented limitations ------------------------------------------------------------------------------------------


def test_limitation_for_on_policy_samples_the_expected_inner_product_is_zero_by_exact_enumeration():
    hidden, logits = torch.randn(2, 5), 1.5 * torch.randn(2, 6)
    pi = logits.softmax(-1)
    expected, off_policy = 0.0, 0.0
    for a in range(6):
        for b in range(6):
            y = torch.tensor([a, b])
            cosine = gradient_cosine(hidden, logits, y, torch.arange(2), 2)[0, 1]
            norms = (F.one_hot(y, 6) - pi).norm(dim=1) * hidden.norm(dim=1)  # |f_i| = |r_i| |h_i| for one token
            expected += pi[0, a] * pi[1, b] * cosine * norms.prod()
            off_policy += cosine * norms.prod() / 36
    assert abs(expected) < 1e-14
    assert abs(off_policy) > 1e-2  # with any other distribution of y it is not


def test_limitation_with_on_policy_responses_the_loss_is_inert_and_with_reference_answers_it_is_not():
    model, n, length = Model(inputs=6, d=16, vocabulary=40), 12, 30
    context = torch.randn(1, 6).expand(n * length, 6) + 0.3 * torch.randn(n * length, 6)  # prompts much alike
    hidden, logits = (t.detach() for t in model(context))
    segment = torch.arange(n).repeat_interleave(length)
    sampled = torch.distributions.Categorical(logits=logits).sample()
    cosine = gradient_cosine(hidden, logits, sampled, segment, n)
    loss, stats = info_nce(cosine)
    assert loss.item() == 0.0 and stats["active"] == 0 and stats["positive"] == 1.0
    assert abs(stats["cosine_mean"]) < 0.1

    template = torch.randint(40, (2, length))[torch.arange(n) % 2].flatten()  # two kinds of reference answer
    loss, stats = info_nce(gradient_cosine(hidden, logits, template, segment, n))
    assert loss > 0.1 and stats["active"] == n


def test_limitation_tau_is_a_boundary_and_not_a_target():
    """Followed downhill, the pairs leave for one side of tau, where the loss is exactly zero, and stay there."""
    vectors = nn.Parameter(torch.randn(8, 16) + 0.9)
    s = F.normalize(vectors, dim=1) @ F.normalize(vectors, dim=1).T
    assert 0 < info_nce(s)[1]["positive"] < 1 and info_nce(s)[0] > 0
    for _ in range(400):
        loss, stats = info_nce(F.normalize(vectors, dim=1) @ F.normalize(vectors, dim=1).T)
        if stats["active"] == 0:
            break
        [gradient] = torch.autograd.grad(loss, vectors)
        with torch.no_grad():
            vectors -= 1.0 * gradient
    assert stats["positive"].item() in (0.0, 1.0) and loss.item() == 0.0
