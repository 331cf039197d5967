"""ntk_infonce.py: Eq. 4 against autograd on a real linear head, F.cross_entropy and loops; and what
it does not do."""

import math
import socket

import pytest
import torch
import torch.nn.functional as F
from conftest import close, tensor
from torch import distributed, nn
from torch.distributed.nn.functional import all_gather
from torch.func import functional_call, jacrev

import ntk_infonce
from examples.equations import descend
from ntk_infonce import (
    cosine,
    empirical_ntk,
    feature_weights,
    gradient_cosine,
    gradient_cosine_chunked,
    hidden_mean,
    info_nce,
    learning_dynamics,
    quantile_tau,
    tensor_sketch,
)

NAN = float("nan")
pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("double_and_seeded")]


# --- Eq. 3 ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """Three layers, the first two shared by all positions: contexts [L, 4] -> logits [L, V]."""

    def __init__(self, vocabulary=7):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, vocabulary)
        )
        for p in self.parameters():
            p.data *= 2

    def forward(self, x):
        return self.layers(x)


def stepped(model, updated, targets, adv, lr):
    """The model after one SGD step on -sum_l A_l log pi(y_l | x_u), by autograd and torch.optim."""
    after = Net(7)
    after.load_state_dict(model.state_dict())
    logp = after(updated).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    after.zero_grad()
    (-(torch.as_tensor(adv) * logp).sum()).backward()
    torch.optim.SGD(after.parameters(), lr).step()
    return after


def errors(rates, model, observed, updated, targets, adv, predict):
    found = []
    for lr in rates:
        after = stepped(model, updated, targets, adv, lr)
        actual = (after(observed).log_softmax(-1) - model(observed).log_softmax(-1)).detach()
        found.append(((predict(lr) - actual).norm() / actual.norm()).item())
    return found


@pytest.mark.parametrize("positions", [(1, 1), (3, 5)])  # (of the observed, of the updated sample)
def test_eq_3_predicts_the_step_up_to_second_order(positions):
    model, (m, n) = Net(), positions
    observed, updated, targets = torch.randn(m, 4), torch.randn(n, 4), torch.randint(7, (n,))
    adv, rates = torch.randn(n) / n, (1e-2, 3e-3, 1e-3)

    def predict(lr):
        return learning_dynamics(model, observed, updated, targets, adv, lr)

    error = errors(rates, model, observed, updated, targets, adv, predict)
    # the relative error falls with lr, so the absolute one with lr^2
    slope = 1 + (math.log(error[0]) - math.log(error[2])) / (
        math.log(rates[0]) - math.log(rates[2])
    )
    assert 1.9 < slope < 2.1 and error[2] < 1e-2


def test_eq_3_negative_controls_miss_by_far():
    model, n = Net(), 4
    observed, updated, targets, lr = (
        torch.randn(n, 4),
        torch.randn(n, 4),
        torch.randint(7, (n,)),
        1e-3,
    )
    adv = tensor([0.5, -0.3, 0.2, 0.7])
    k = empirical_ntk(model, observed, updated)
    pi_o, pi_u = model(observed).softmax(-1).detach(), model(updated).softmax(-1).detach()
    force = adv[:, None] * (F.one_hot(targets, 7) - pi_u)

    def form(k, force, jac=lambda dz: dz - (pi_o * dz).sum(-1, keepdim=True)):
        return lambda lr: lr * jac(torch.einsum("mvlw,lw->mv", k, force))

    def error(predict):
        return errors([lr], model, observed, updated, targets, adv, predict)[0]

    assert error(form(k, force)) < 1e-2
    assert error(form(k.permute(2, 3, 0, 1), force)) > 0.1  # K transposed
    assert error(form(k, -force)) > 1  # the sign
    assert error(form(k, force / adv[:, None])) > 0.1  # without the advantage
    assert error(form(k, F.one_hot(targets, 7) * adv[:, None])) > 0.1  # without - pi
    assert error(form(k, force, lambda dz: dz)) > 0.1  # without the softmax Jacobian
    # with it transposed
    assert error(form(k, force, lambda dz: dz - pi_o * dz.sum(-1, keepdim=True))) > 0.1


def test_the_kernel_is_the_product_of_explicit_jacobian_rows():
    """The kernel is the product of explicit Jacobian rows. It is symmetric in its pair."""
    model, observed, updated = Net(), torch.randn(2, 4), torch.randn(3, 4)
    k = empirical_ntk(model, observed, updated)
    assert k.shape == (2, 7, 3, 7)

    def row(x, position, token):
        grads = torch.autograd.grad(model(x)[position, token], list(model.parameters()))
        return torch.cat([g.flatten() for g in grads])

    for (m, v), (n, w) in [((0, 0), (0, 0)), ((1, 3), (2, 6)), ((0, 6), (1, 2))]:
        close(k[m, v, n, w], row(observed, m, v) @ row(updated, n, w), 1e-12)
    close(k, empirical_ntk(model, updated, observed).permute(2, 3, 0, 1), 1e-12)
    assert (
        k - empirical_ntk(model, updated[:2], torch.cat([observed, observed[:1]]))
    ).abs().max() > 1e-2


def test_frozen_parameters_are_not_in_the_kernel():
    model, x = Net(), torch.randn(2, 4)
    for p in model.layers[:4].parameters():
        p.requires_grad_(False)
    hidden = torch.cat([model.layers[:4](x), torch.ones(2, 1)], 1)  # the head's input, and its bias
    close(
        empirical_ntk(model, x, x),
        torch.einsum("md,ld,vw->mvlw", hidden, hidden, torch.eye(7)).detach(),
        1e-12,
    )


def test_the_prediction_keeps_total_probability():
    """The prediction keeps total probability. It follows the advantage."""
    model, observed, updated, y = Net(), torch.randn(3, 4), torch.randn(2, 4), torch.tensor([1, 5])
    moved = learning_dynamics(model, observed, updated, y, 0.7, 1e-2)
    close((model(observed).softmax(-1) * moved).sum(-1).detach(), torch.zeros(3), 1e-15)
    close(learning_dynamics(model, observed, updated, y, -0.7, 1e-2), -moved, 1e-15)
    close(learning_dynamics(model, observed, updated, y, tensor([0.7, 0.7]), 1e-2), moved, 1e-15)
    itself = learning_dynamics(model, updated, updated, y, 1.0, 1e-2)
    assert sum(itself[i, y[i]] for i in range(2)) > 0  # what was rewarded becomes likelier


def test_eq_3_is_the_inner_product_that_eq_4_normalises():
    """Eq. 3 is the inner product of log-prob gradients. Eq. 4 normalises it."""
    model, observed, updated = Net(), torch.randn(1, 4), torch.randn(1, 4)
    y_o, y_u = torch.tensor([2]), torch.tensor([4])
    moved = learning_dynamics(model, observed, updated, y_u, 1.0, 1.0)[0, 2]

    def gradient(x, y, parameters):
        return torch.autograd.grad(model(x).log_softmax(-1)[0, y], parameters)

    both = [
        gradient(x, y, list(model.parameters())) for x, y in ((observed, y_o[0]), (updated, y_u[0]))
    ]
    close(moved, sum((a * b).sum() for a, b in zip(*both, strict=True)), 1e-12)
    head = model.layers[4].weight  # Eq. 4: the same for the head only, divided by the norms
    f_o, f_u = (gradient(x, y, [head])[0] for x, y in ((observed, y_o[0]), (updated, y_u[0])))
    hidden = torch.cat([model.layers[:4](observed), model.layers[:4](updated)])
    cosine = gradient_cosine(
        hidden, model.layers[4](hidden), torch.cat([y_o, y_u]), torch.arange(2), 2
    )[0, 1]
    close(cosine.detach(), F.cosine_similarity(f_o.flatten(), f_u.flatten(), dim=0), 1e-10)


def test_the_jacobians_are_those_of_torch_func():
    model, x = Net(), torch.randn(2, 4)
    parameters = dict(model.named_parameters())
    j = jacrev(lambda p: functional_call(model, p, (x,)))(parameters)
    flat = torch.cat([j[name].flatten(2) for name in parameters], 2).detach()
    close(empirical_ntk(model, x, x), torch.einsum("mvp,lwp->mvlw", flat, flat), 1e-12)


# --- feature_weights ------------------------------------------------------------------------------

# two prompts, two responses
MASK = tensor([[[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 1, 0, 0], [1, 1, 1, 1]]]).bool()
ADV = tensor([[-0.5, 0.5], [0.7, -0.7]])
EXTRA = tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()


def test_the_weights_of_every_choice_by_hand():
    nothing = torch.zeros(2, 2, 4)
    beside = EXTRA / 2.0
    for choice in ("reference", "own_prefix", "greedy"):
        close(feature_weights(choice, MASK, ADV, EXTRA), torch.cat([nothing, beside[:, None]], 1))
    best, advantage = nothing.clone(), nothing.clone()
    best[0, 1, 0], best[1, 0, :2] = 1, 0.5
    close(feature_weights("best", MASK, ADV, EXTRA)[:, :2], best)
    advantage[0, 0, :3], advantage[0, 1, 0], advantage[1, 0, :2], advantage[1, 1] = (
        -0.5 / 3,
        0.5,
        0.35,
        -0.7 / 4,
    )
    close(feature_weights("advantage", MASK, ADV, EXTRA)[:, :2], advantage)
    for choice in ("best", "advantage"):
        assert feature_weights(choice, MASK, ADV, EXTRA)[:, 2].abs().sum() == 0


def test_of_tied_responses_the_first_is_best():
    """The first of tied responses is best. A tied group has no advantage feature."""
    tied = torch.zeros(2, 2)
    assert feature_weights("best", MASK, tied, EXTRA)[:, 0].sum() == 2
    assert feature_weights("advantage", MASK, tied, EXTRA).abs().sum() == 0


def test_a_response_without_tokens_gives_no_nan():
    for choice in ("reference", "best", "advantage"):
        weights = feature_weights(choice, torch.zeros_like(MASK), ADV, torch.zeros_like(EXTRA))
        assert torch.equal(weights, torch.zeros(2, 3, 4))


def test_the_advantage_feature_is_the_policy_gradient():
    """f_i = grad_W sum_g A_g (1 / |y_g|) sum_t log pi(y_gt): the weights, put on the hidden states,
    give just that."""
    model, y = Model(), torch.randint(11, (2, 2, 4))
    hidden, logits = model(torch.randn(2, 2, 4, 4))
    weights = feature_weights("advantage", MASK, ADV, EXTRA)[:, :2]
    logp = logits.log_softmax(-1).gather(-1, y[..., None])[..., 0]
    per_response = (logp * MASK).sum(-1) / MASK.sum(-1)
    rows = [
        torch.autograd.grad((ADV[i] * per_response[i]).sum(), model.head.weight, retain_graph=True)[
            0
        ].flatten()
        for i in range(2)
    ]
    where = weights != 0
    segment = torch.arange(2)[:, None, None].expand_as(where)[where]
    got = gradient_cosine(
        hidden[where] * weights[where][:, None], logits[where], y[where], segment, 2
    )
    close(got.detach(), cosines(torch.stack(rows)), 1e-10)


@pytest.mark.parametrize("choice", ["hidden_mean", "worst"])
def test_a_choice_without_tokens_or_unknown_is_refused(choice):
    with pytest.raises(ValueError, match="choice"):
        feature_weights(choice, MASK, ADV, EXTRA)


def test_tables_that_do_not_fit_are_refused():
    for arguments in ((MASK, ADV[:1], EXTRA), (MASK, ADV, EXTRA[:, :2]), (MASK[0], ADV, EXTRA)):
        with pytest.raises(ValueError, match=r"mask|adv"):
            feature_weights("best", *arguments)


# --- gradient_cosine ------------------------------------------------------------------------------


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
    grads = [
        torch.autograd.grad(logp[segment == i].sum(), model.head.weight, create_graph=True)[0]
        for i in range(n)
    ]
    rows = torch.stack([g.flatten() for g in grads])
    return rows if create_graph else rows.detach()


def cosines(rows):
    return F.cosine_similarity(rows[:, None], rows[None], dim=-1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 4, 2], [7, 5]])
def test_the_cosine_is_that_of_a_real_head_s_gradients(lengths, bias):
    """The cosine is that of the autograd gradients of a real head."""
    model, (x, y, segment), n = Model(bias=bias), sample(lengths), len(lengths)
    got = gradient_cosine(*model(x), y, segment, n)
    close(got, cosines(head_gradients(model, x, y, segment, n)), 1e-10)
    assert got.shape == (n, n) and got.detach().triu(1).abs().max() > 0.01


def test_the_cosine_s_own_gradient_is_the_double_backward():
    """The cosine's own gradient is the double backward through head and body."""
    model, (x, y, segment) = Model(), sample([3, 1, 4, 2])
    coefficients = torch.randn(4, 4)
    parameters = list(model.parameters())
    got = torch.autograd.grad(
        (coefficients * gradient_cosine(*model(x), y, segment, 4)).sum(), parameters
    )
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


def test_the_matrix_is_symmetric_and_positive_semidefinite():
    """The matrix is symmetric and positive semidefinite. Its diagonal is one."""
    model, (x, y, segment) = Model(), sample([3, 1, 4, 2, 5])
    got = gradient_cosine(*model(x), y, segment, 5).detach()
    close(got, got.T, 1e-14)
    close(got.diagonal(), torch.ones(5), 1e-14)
    assert torch.linalg.eigvalsh(got).min() > -1e-12 and got.abs().max() <= 1 + 1e-12


def test_permuting_the_samples_permutes_the_cosines():
    """Permuting the samples permutes the cosines. The order of the tokens does not matter."""
    model, (x, y, segment) = Model(), sample([3, 1, 4, 2])
    hidden, logits = (t.detach() for t in model(x))
    got = gradient_cosine(hidden, logits, y, segment, 4)
    order = torch.tensor([2, 0, 3, 1])
    renamed = gradient_cosine(hidden, logits, y, order.argsort()[segment], 4)
    close(renamed, got[order][:, order], 1e-14)
    tokens = torch.randperm(10)
    close(
        gradient_cosine(hidden[tokens], logits[tokens], y[tokens], segment[tokens], 4), got, 1e-14
    )


def test_a_sample_s_cosines_do_not_depend_on_the_batch():
    """A sample's cosines do not depend on who else is in the batch."""
    model, (x, y, segment) = Model(), sample([3, 1, 4, 2])
    hidden, logits = model(x)
    first = segment < 2
    pair = gradient_cosine(hidden[first], logits[first], y[first], segment[first], 2)
    close(pair, gradient_cosine(hidden, logits, y, segment, 4)[:2, :2], 1e-14)


def test_scaled_hidden_states_or_repeated_tokens_change_nothing():
    """Scaling the hidden states or repeating the tokens of a sample changes nothing."""
    model, (x, y, segment) = Model(), sample([3, 1, 4])
    hidden, logits = (t.detach() for t in model(x))
    got = gradient_cosine(hidden, logits, y, segment, 3)
    scale = tensor([10, 1e-6, 3])[segment][:, None]
    close(gradient_cosine(hidden * scale, logits, y, segment, 3), got, 1e-12)
    twice = torch.cat([torch.arange(8), torch.arange(3)])  # sample 0 two times
    close(gradient_cosine(hidden[twice], logits[twice], y[twice], segment[twice], 3), got, 1e-12)


def test_a_constant_added_to_the_logits_changes_nothing():
    """A constant added to the logits changes nothing. A temperature does."""
    model, (x, y, segment) = Model(), sample([3, 1, 4])
    hidden, logits = (t.detach() for t in model(x))
    got = gradient_cosine(hidden, logits, y, segment, 3)
    close(gradient_cosine(hidden, logits + 5, y, segment, 3), got, 1e-12)
    assert (gradient_cosine(hidden, logits / 0.2, y, segment, 3) - got).abs().max() > 1e-2


def test_a_sample_with_no_gradient_or_no_token_gives_zeros():
    """A sample with no gradient or no token gives zeros and no NaN."""
    hidden = torch.randn(3, 4, requires_grad=True)
    logits = torch.zeros(3, 6)
    logits[0, 2] = 1e4  # certain of its target: the gradient of log pi is exactly zero
    logits.requires_grad_()
    got = gradient_cosine(hidden, logits, torch.tensor([2, 1, 3]), torch.tensor([0, 1, 2]), 4)
    assert torch.equal(got[0], torch.zeros(4)) and torch.equal(got[:, 3], torch.zeros(4))
    got.sum().backward()
    assert (
        hidden.grad.isfinite().all()
        and logits.grad.isfinite().all()
        and hidden.grad[1:].abs().sum() > 0
    )


def test_rows_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="one row per token"):
        gradient_cosine(
            torch.zeros(3, 2), torch.zeros(3, 4), torch.zeros(2).long(), torch.zeros(3).long(), 1
        )


def test_single_precision_is_good_to_six_digits():
    model, (x, y, segment) = Model(), sample([3, 1, 4, 2])
    hidden, logits = (t.detach() for t in model(x))
    single = gradient_cosine(hidden.float(), logits.float(), y, segment, 4)
    assert single.dtype == torch.float32
    close(single.double(), gradient_cosine(hidden, logits, y, segment, 4), 2e-6)


@pytest.mark.parametrize("name", ["hidden", "logits", "targets"])
def test_a_table_with_another_number_of_rows_is_named(name):
    tables = {
        "hidden": torch.zeros(3, 2),
        "logits": torch.zeros(3, 4),
        "targets": torch.zeros(3).long(),
    }
    tables[name] = tables[name][:2]
    with pytest.raises(ValueError, match=f"{name} must have one row per token"):
        gradient_cosine(**tables, segment=torch.zeros(3).long(), n=1)
    tables[name] = torch.zeros(3, 2, 2)
    with pytest.raises(ValueError, match=f"{name} must have one row per token"):
        gradient_cosine(**tables, segment=torch.zeros(3).long(), n=1)


def test_a_sample_number_outside_the_batch_is_refused():
    for segment in ([0, 1, 3], [-1, 0, 1]):
        with pytest.raises(ValueError, match="segment"):
            gradient_cosine(
                torch.zeros(3, 2),
                torch.zeros(3, 4),
                torch.zeros(3).long(),
                torch.tensor(segment),
                3,
            )


def test_half_precision_hidden_states_are_taken():
    model, (x, y, segment) = Model(), sample([3, 1, 4, 2])
    hidden, logits = (t.detach() for t in model(x))
    half = gradient_cosine(hidden.bfloat16(), logits.float(), y, segment, 4)
    assert half.dtype == torch.float32
    close(half.double(), gradient_cosine(hidden, logits, y, segment, 4), 2e-2)
    chunked = gradient_cosine_chunked(
        hidden.bfloat16(), model.head.weight.bfloat16(), y, segment, 4, chunk=4
    )
    assert chunked.dtype == torch.float32
    coarse = gradient_cosine(hidden.bfloat16(), logits.bfloat16(), y, segment, 4)
    assert (
        coarse.dtype == torch.float32
        and hidden_mean(hidden.bfloat16(), segment, 4).dtype == torch.float32
    )
    close(coarse.diagonal(), torch.ones(4, dtype=torch.float32), 1e-6)
    large = gradient_cosine(100 * hidden.half(), logits.half(), y, segment, 4)
    assert large.isfinite().all()
    close(chunked.double(), gradient_cosine(hidden, logits, y, segment, 4), 2e-2)


def test_tokens_beyond_the_vocabulary_are_refused():
    """Whole numbers of any type are taken. Tokens beyond the vocabulary are refused."""
    model, (x, y, segment) = Model(), sample([3, 1, 4])
    hidden, logits = (t.detach() for t in model(x))
    for form in (
        lambda y, s: gradient_cosine(hidden, logits, y, s, 3),
        lambda y, s: gradient_cosine_chunked(hidden, model.head.weight, y, s, 3),
        lambda y, s: tensor_sketch(hidden, logits, y, s, 3, 64),
    ):
        assert torch.equal(form(y.int(), segment.int()), form(y, segment))
        for bad in (11, -100):
            with pytest.raises(ValueError, match="targets"):
                form(torch.where(segment == 0, bad, y), segment)


def test_no_tokens_at_all_give_zeros():
    empty = (
        torch.zeros(0, 4, requires_grad=True),
        torch.zeros(0, 6),
        torch.zeros(0).long(),
        torch.zeros(0).long(),
    )
    cosine = gradient_cosine(*empty, 2)
    info_nce(cosine)[0].backward()
    assert torch.equal(cosine, torch.zeros(2, 2))


# --- the chunked form -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_the_chunked_form_and_its_gradients_equal_the_dense_one(chunk, bias):
    model, (x, y, segment) = Model(bias=bias), sample([3, 1, 4, 2])
    coefficients, parameters = torch.randn(4, 4), list(model.parameters())
    hidden, logits = model(x)
    dense = gradient_cosine(hidden, logits, y, segment, 4)
    chunked = gradient_cosine_chunked(
        hidden, model.head.weight, y, segment, 4, model.head.bias, chunk
    )
    close(chunked, dense, 1e-12)
    want = torch.autograd.grad((coefficients * dense).sum(), parameters, retain_graph=True)
    for ours, theirs in zip(
        torch.autograd.grad((coefficients * chunked).sum(), parameters), want, strict=True
    ):
        close(ours, theirs, 1e-12)


def test_a_token_that_cannot_be_sampled_is_left_out_by_the_bias():
    model, (x, y, segment) = Model(), sample([3, 4], vocabulary=9)
    bias = torch.zeros(11).index_fill(0, torch.tensor([9, 10]), -torch.inf)
    hidden, logits = model(x)
    dense = gradient_cosine(hidden, logits[:, :9], y, segment, 2)
    chunked = gradient_cosine_chunked(hidden, model.head.weight, y, segment, 2, bias, 4)
    close(chunked, dense, 1e-12)
    chunked[0, 1].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    hidden, logits = model(x)
    # a whole chunk that cannot be sampled
    bias = torch.zeros(11).index_fill(0, torch.arange(4), -torch.inf)
    dense = gradient_cosine(hidden.detach(), logits[:, 4:].detach(), y % 7, segment, 2)
    whole = gradient_cosine_chunked(hidden, model.head.weight, y % 7 + 4, segment, 2, bias, 4)
    close(whole.detach(), dense, 1e-12)
    whole[0, 1].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("gap", [12.0, 16.0, 18.0, 20.0, 25.0])
def test_an_all_but_certain_direction_is_not_round_off(gap):
    """The direction is not round-off where the model is all but certain."""
    hidden = 3 * torch.randn(2, 512) + 1
    logits = torch.randn(2, 50)
    logits[:, 7] = gap
    y, segment = torch.tensor([7, 7]), torch.arange(2)
    want = gradient_cosine(hidden, logits, y, segment, 2)
    close(gradient_cosine(hidden.float(), logits.float(), y, segment, 2).double(), want, 1e-4)
    weight = torch.linalg.lstsq(hidden, logits).solution.T  # a head that gives these logits
    close(gradient_cosine_chunked(hidden, weight, y, segment, 2, chunk=16), want, 1e-6)


def test_the_chunked_form_passes_gradcheck():
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    y, segment = torch.randint(7, (5,)), torch.tensor([0, 0, 1, 1, 2])
    assert torch.autograd.gradcheck(
        lambda h, w: gradient_cosine_chunked(h, w, y, segment, 3, chunk=3), (hidden, weight)
    )
    assert torch.autograd.gradcheck(
        lambda h, w: gradient_cosine(h, h @ w.T, y, segment, 3), (hidden, weight)
    )


# --- the sketch -----------------------------------------------------------------------------------


def gram_of(rows):
    return rows @ rows.T


def test_the_sketch_is_unbiased_for_the_gram_matrix():
    """The sketch is unbiased for the Gram matrix. Its error falls with the root of m."""
    _, y, segment = sample([4, 7, 5, 6], vocabulary=60)
    hidden, logits = (
        torch.randn(22, 16) + 2,
        2 * torch.randn(22, 60),
    )  # a common direction, as real hidden states have
    r = F.one_hot(y, 60) - logits.softmax(-1)
    exact = gram_of(
        torch.stack([(r[segment == i].T @ hidden[segment == i]).flatten() for i in range(4)])
    )
    spread = []
    for m in (64, 256):
        sketches = torch.stack(
            [gram_of(tensor_sketch(hidden, logits, y, segment, 4, m, seed)) for seed in range(200)]
        )
        standard_error = sketches.std(0) / math.sqrt(200)
        assert ((sketches.mean(0) - exact).abs() < 4 * standard_error).all()
        scale = exact.diagonal().sqrt()
        relative = (sketches - exact) / (scale[:, None] * scale)
        spread.append(
            relative[:, ~torch.eye(4, dtype=torch.bool)].square().mean().sqrt().item()
            * math.sqrt(m)
        )
    assert all(0.7 < s < 2 for s in spread)


def test_the_sketch_s_cosines_approach_the_exact_ones():
    model, (x, y, segment) = Model(d=16, vocabulary=60), sample([4, 7, 5, 6], vocabulary=60)
    hidden, logits = (t.detach() for t in model(x))
    unit = F.normalize(tensor_sketch(hidden, logits, y, segment, 4, 2**16))
    assert (unit @ unit.T - gradient_cosine(hidden, logits, y, segment, 4)).abs().max() < 0.02


def test_one_seed_is_one_hash_and_another_seed_another():
    """One seed is one hash whatever the process holds. Another seed is another."""
    model, (x, y, segment) = Model(), sample([3, 2])
    hidden, logits = (t.detach() for t in model(x))
    whole = tensor_sketch(hidden, logits, y, segment, 2, 128, seed=5)
    torch.manual_seed(123)  # the global generator has no say
    mine = segment == 1  # what a second process would hold
    alone = tensor_sketch(hidden[mine], logits[mine], y[mine], segment[mine] - 1, 1, 128, seed=5)
    close(alone[0], whole[1], 1e-12)
    assert (tensor_sketch(hidden, logits, y, segment, 2, 128, seed=6) - whole).abs().max() > 1e-2


def test_gradients_flow_through_the_sketch():
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    y, segment = torch.randint(7, (5,)), torch.tensor([0, 0, 1, 1, 2])
    assert torch.autograd.gradcheck(
        lambda h, w: tensor_sketch(h, h @ w.T, y, segment, 3, m=9), (hidden, weight)
    )


def test_the_sketch_takes_half_precision_and_refuses_size_zero():
    """The sketch takes half precision. It refuses a size of zero."""
    y, segment = torch.tensor([0, 1]), torch.tensor([0, 1])
    half = tensor_sketch(torch.randn(2, 3).bfloat16(), torch.randn(2, 4).float(), y, segment, 2, 16)
    assert half.dtype == torch.float32 and half.shape == (2, 16)
    with pytest.raises(ValueError, match="m must be"):
        tensor_sketch(torch.randn(2, 3), torch.randn(2, 4), y, segment, 2, 0)


def gathered_gradient(rank, port, samples, out):
    """One of two processes: half the samples, sketches of all of them, Eq. 4 on all, its own
    parameters' gradient."""
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model, (x, y, segment) = Model(), samples
    mine = (segment // 2) == rank
    sketch = tensor_sketch(*model(x[mine]), y[mine], segment[mine] - 2 * rank, 2, 4096, seed=3)
    unit = F.normalize(torch.cat(all_gather(sketch)))
    info_nce(unit @ unit.T, 0.1)[0].backward()
    for p in model.parameters():
        if p.grad is not None:
            distributed.all_reduce(p.grad)
            p.grad /= 2  # DDP's mean
    if rank == 0:
        torch.save([p.grad for p in model.parameters() if p.grad is not None], out)
    distributed.destroy_process_group()


def test_gathered_sketches_give_the_whole_batch_s_gradient(tmp_path):
    """Two processes that gather their sketches get the gradient of the whole batch."""
    samples = sample([3, 2, 4, 3])
    torch.manual_seed(0)
    model, (x, y, segment) = Model(), samples
    unit = F.normalize(tensor_sketch(*model(x), y, segment, 4, 4096, seed=3))
    loss, stats = info_nce(unit @ unit.T, 0.1)
    loss.backward()
    assert stats["active"] >= 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(gathered_gradient, (port, samples, tmp_path / "g.pt"), nprocs=2)
    want = [p.grad for p in model.parameters() if p.grad is not None]
    for ours, theirs in zip(torch.load(tmp_path / "g.pt"), want, strict=True):
        close(ours, theirs, 1e-10)
    assert want[0].norm() > 1e-3


# --- hidden_mean ----------------------------------------------------------------------------------


def test_the_mean_of_hidden_states_by_hand_and_against_a_loop():
    hidden, segment = tensor([[1, 0], [3, 0], [0, 2], [1, 1]]), torch.tensor([0, 0, 1, 2])
    half = math.sqrt(0.5)
    close(
        cosine(hidden_mean(hidden, segment, 3)),
        tensor([[1, 0, half], [0, 1, half], [half, half, 1]]),
        1e-12,
    )
    hidden, segment = torch.randn(9, 5), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 2])
    means = torch.stack([hidden[segment == i].mean(0) for i in range(3)])
    close(hidden_mean(hidden, segment, 3), means, 1e-12)
    close(cosine(means), cosines(means), 1e-12)
    assert hidden_mean(hidden[:2], segment[:2], 4)[2:].abs().sum() == 0, "a prompt without tokens"


def test_limitation_the_official_feature_is_no_gradient_cosine():
    """It knows neither y nor pi: two answers to one prompt are alike to it, to the gradient they
    can be opposite."""
    hidden, logits = torch.randn(1, 5).expand(2, 5), torch.zeros(2, 2)
    y, segment = torch.tensor([0, 1]), torch.arange(2)
    close(cosine(hidden_mean(hidden, segment, 2))[0, 1], 1.0)
    close(gradient_cosine(hidden, logits, y, segment, 2)[0, 1], -1.0)
    model, (x, y, segment) = Model(d=16, vocabulary=60), sample([6] * 40, vocabulary=60)
    hidden, logits = (t.detach() for t in model(x))
    off = ~torch.eye(40, dtype=torch.bool)
    pair = torch.stack(
        [
            cosine(hidden_mean(hidden, segment, 40))[off],
            gradient_cosine(hidden, logits, y, segment, 40)[off],
        ]
    )
    assert pair.corrcoef()[0, 1].abs() < 0.5


# --- info_nce -------------------------------------------------------------------------------------

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


def test_the_defaults_are_the_paper_s_tau_and_no_temperature():
    """The defaults are the paper's threshold and no temperature."""
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
def test_the_gradient_is_q_minus_p_over_the_temperature(temperature):
    """The gradient is q - p over the temperature and the number of active anchors."""
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
    assert torch.equal(s.grad.diagonal(), torch.zeros(6)) and torch.equal(
        s.grad[:2], torch.zeros(2, 6)
    )


def test_the_dissimilar_are_pulled_and_the_similar_pushed():
    """The dissimilar are pulled closer. The similar are pushed away."""
    s = MIXED.clone().requires_grad_()
    info_nce(s, 0.5)[0].backward()
    off = ~torch.eye(4, dtype=torch.bool)
    assert (s.grad[off & (MIXED <= 0.5)] < 0).all() and (s.grad[off & (MIXED > 0.5)] > 0).all()
    close(s.grad.sum(1), torch.zeros(4), 1e-15)  # it only redistributes within a row


def test_one_step_lowers_the_largest_negative_of_a_mixed_row():
    """One step on a mixed row lowers its largest negative relative to its mean positive."""
    s = MIXED.clone().requires_grad_()
    after = MIXED - 0.1 * torch.autograd.grad(info_nce(s, 0.5)[0], s)[0]
    for i in range(4):
        others = torch.arange(4) != i
        positive, negative = others & (MIXED[i] <= 0.5), others & (MIXED[i] > 0.5)
        assert (after[i][negative].max() - after[i][positive].mean()) < (
            MIXED[i][negative].max() - MIXED[i][positive].mean()
        )


def test_one_step_does_the_same_to_a_real_model_s_cosines():
    """One step of the parameters does the same to the cosines of a real model."""
    model, (x, y, segment) = Model(), sample([2] * 6, vocabulary=3)
    before = gradient_cosine(*model(x), y, segment, 6)
    loss, stats = info_nce(before, 0.2)
    parameters = list(model.parameters())
    with torch.no_grad():
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
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
def test_the_loss_is_zero_where_all_pairs_lie_on_one_side(value):
    """Loss and gradient are exactly zero where all pairs lie on one side of tau."""
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
def test_batches_too_small_for_a_contrast_give_zero(n):
    """Batches too small for a positive and a negative give zero and no NaN."""
    s = torch.full((n, n), 0.3).requires_grad_()
    loss, stats = info_nce(s)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(s.grad, torch.zeros(n, n))
    assert all(value.isfinite() for value in stats.values()) and stats["active"] == 0


def test_duplicates_give_a_finite_loss_and_finite_parameters():
    model, (x, y, segment) = Model(), sample([2, 2, 2])
    x, y, segment = (
        torch.cat([x, x]),
        torch.cat([y, y]),
        torch.cat([segment, segment + 3]),
    )  # every sample twice
    cosine = gradient_cosine(*model(x), y, segment, 6)
    close(cosine[0, 3].item(), 1.0)
    loss, stats = info_nce(cosine, 0.54, 0.05)
    loss.backward()
    assert loss.isfinite() and loss > 0 and stats["active"] == 6
    assert (
        all(p.grad.isfinite().all() for p in model.parameters())
        and model.head.weight.grad.norm() > 0
    )

    model.zero_grad()
    same = gradient_cosine(
        *model(x[:2].repeat(4, 1)), y[:2].repeat(4), torch.arange(4).repeat_interleave(2), 4
    )
    loss, stats = info_nce(same)
    loss.backward()
    assert loss.item() == 0.0 and stats["active"] == 0
    assert all(
        torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters() if p.grad is not None
    )


@pytest.mark.parametrize("junk", [0.0, -1.0, 100.0, -1e6])
def test_the_diagonal_is_ignored_in_loss_gradient_and_statistics(junk):
    def run(s):
        s = s.clone().requires_grad_()
        loss, stats = info_nce(s, 0.5, 0.5)
        loss.backward()
        return [loss.detach(), s.grad, *stats.values()]

    for ours, theirs in zip(run(MIXED.clone().fill_diagonal_(junk)), run(MIXED), strict=True):
        assert torch.equal(ours, theirs)


def test_membership_is_decided_on_the_cosine_itself():
    """Membership is decided on the cosine and not on the cosine over the temperature."""
    s = tensor([[1, 0.3, 0.7], [0.3, 1, 0.7], [0.3, 0.7, 1]])
    for temperature in (0.1, 1.0, 10.0):
        assert info_nce(s, 0.5, temperature)[1]["active"] == 3
        close(info_nce(s, 0.5, temperature)[0].item(), math.log1p(math.exp(0.4 / temperature)))


def test_membership_carries_no_gradient():
    """The loss jumps where a pair crosses tau; its gradient is that of the smooth part at either
    side."""
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


def test_duplicates_that_rounding_lifts_are_not_beyond_tau():
    """Duplicates that rounding takes beyond 1 are not beyond tau."""
    s = torch.full((3, 3), 1.0 + 2e-7, dtype=torch.float32)
    assert info_nce(s, 1.0)[1]["positive"] == 1.0


def test_small_temperatures_do_not_overflow():
    s = MIXED.clone().float().requires_grad_()
    loss, _ = info_nce(s, 0.5, 1e-3)
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all() and loss > 100


# --- documented limitations -----------------------------------------------------------------------


def test_limitation_on_policy_the_expected_product_is_zero():
    """The expected inner product of on-policy samples is zero by exact enumeration."""
    hidden, logits = torch.randn(2, 5), 1.5 * torch.randn(2, 6)
    pi = logits.softmax(-1)
    expected, off_policy = 0.0, 0.0
    for a in range(6):
        for b in range(6):
            y = torch.tensor([a, b])
            cosine = gradient_cosine(hidden, logits, y, torch.arange(2), 2)[0, 1]
            # |f_i| = |r_i| |h_i| for one token
            norms = (F.one_hot(y, 6) - pi).norm(dim=1) * hidden.norm(dim=1)
            expected += pi[0, a] * pi[1, b] * cosine * norms.prod()
            off_policy += cosine * norms.prod() / 36
    assert abs(expected) < 1e-14
    assert abs(off_policy) > 1e-2  # with any other distribution of y it is not


def test_limitation_the_loss_is_inert_on_policy():
    """The loss is inert with on-policy responses. It is not with reference answers."""
    model, n, length = Model(inputs=6, d=16, vocabulary=40), 12, 30
    # prompts much alike
    context = torch.randn(1, 6).expand(n * length, 6) + 0.3 * torch.randn(n * length, 6)
    hidden, logits = (t.detach() for t in model(context))
    segment = torch.arange(n).repeat_interleave(length)
    sampled = torch.distributions.Categorical(logits=logits).sample()
    cosine = gradient_cosine(hidden, logits, sampled, segment, n)
    loss, stats = info_nce(cosine)
    assert loss.item() == 0.0 and stats["active"] == 0 and stats["positive"] == 1.0
    assert abs(stats["cosine_mean"]) < 0.1

    template = torch.randint(40, (2, length))[
        torch.arange(n) % 2
    ].flatten()  # two kinds of reference answer
    loss, stats = info_nce(gradient_cosine(hidden, logits, template, segment, n))
    assert loss > 0.1 and stats["active"] == n


def test_limitation_tau_is_a_boundary_and_not_a_target():
    """Followed downhill, the pairs leave for one side of tau, where the loss is exactly zero, and
    stay there."""
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


@pytest.mark.parametrize("spread, end", [((0.2, 1.6), 1.0), ((0.6, 1.2), 0.0)])
def test_limitation_pairs_are_absorbed_from_either_side(spread, end):
    """Mostly below tau: all end at or below it. Mostly above: all end above. There is no balanced
    range. Nothing moves again."""
    torch.manual_seed(0)
    vectors = torch.randn(16, 64) + (spread[0] + spread[1] * torch.rand(16, 1))
    path = descend(8 * F.normalize(vectors), 1000, lr=10.0)
    off = ~torch.eye(16, dtype=torch.bool)
    below = (path[:, off] <= 0.54).double().mean(1)
    assert 0 < below[0] < 1 and below[-1] == end
    assert torch.equal(path[-50], path[-1])


@pytest.mark.parametrize("cosine", [0.0, 0.92])
def test_limitation_all_dissimilar_or_all_alike_never_moves(cosine):
    """A batch that starts all dissimilar or all alike never moves."""
    vectors = torch.eye(8, 9) if cosine == 0 else torch.eye(8, 9) * 0.3 + tensor([0.0] * 8 + [1.0])
    path = descend(vectors, 20)
    assert torch.equal(path[0], path[-1])
    close(
        path[0][~torch.eye(8, dtype=torch.bool)].mean().item(),
        cosine if cosine == 0 else 1 / 1.09,
        1e-3,
    )


def test_limitation_the_official_fall_back_pulls_all_together():
    """Where no pair is dissimilar, the official code makes the least similar one a positive:
    cosines go to 1 (D-57)."""
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(8, 32) + 3.5).requires_grad_()
    means = []
    for _ in range(500):
        unit = F.normalize(vectors)
        s = (unit @ unit.T).masked_fill(torch.eye(8, dtype=torch.bool), -torch.inf)
        least = unit @ unit.T + 2 * torch.eye(8)
        loss = F.cross_entropy(s, least.argmin(1))
        means.append(s[~torch.eye(8, dtype=torch.bool)].mean().item())
        vectors = (vectors - 1.0 * torch.autograd.grad(loss, vectors)[0]).detach().requires_grad_()
    assert 0.9 < means[0] < 0.95 and means[-1] > means[0] + 0.03
    unit = F.normalize(vectors)
    assert info_nce(unit @ unit.T)[0] == 0  # ours leaves them alone


def test_limitation_on_policy_features_have_no_correlation():
    """On-policy features of different prompts have no correlation over many draws."""
    model, (x, _, segment) = Model(d=8, vocabulary=30), sample([5] * 6)
    hidden, logits = (t.detach() for t in model(x))
    draws = []
    for _ in range(400):
        y = torch.distributions.Categorical(logits=logits).sample()
        r = ntk_infonce._residual(logits, y)
        member = F.one_hot(segment, 6).double()
        draws.append(member.T @ ((r @ r.T) * (hidden @ hidden.T)) @ member)
    draws = torch.stack(draws)[:, ~torch.eye(6, dtype=torch.bool)]
    standard_error = draws.std(0) / math.sqrt(400)
    assert (draws.mean(0).abs() < 4 * standard_error).all() and standard_error.max() < 0.2


# --- quantile_tau ---------------------------------------------------------------------------------


def table_of(pairs):
    """The symmetric cosines [n, n] whose pairs i < j, row by row, are these."""
    n = (1 + math.isqrt(1 + 8 * len(pairs))) // 2
    s, (row, column) = torch.eye(n), torch.triu_indices(n, n, offset=1)
    s[row, column] = s[column, row] = tensor(pairs)
    return s


@pytest.mark.parametrize("quantile", [0.1, 0.25, 0.5, 0.8])
def test_the_quantile_splits_the_pairs_wherever_they_lie(quantile):
    for shift in (-0.5, 0.0, 0.4):
        pairs = (0.3 * torch.rand(21) + shift).tolist()
        tau, below = quantile_tau(table_of(pairs), quantile), round(quantile * 21)
        low, high = sorted(pairs)[below - 1 : below + 1]
        assert tau == pytest.approx((low + high) / 2) and sum(s <= tau for s in pairs) == below
        assert info_nce(table_of(pairs), tau)[1]["active"] >= 3


def test_rounding_does_not_decide_a_pair_s_side_of_tau():
    """A median on a pair's own cosine changes the loss when every cosine moves by a millionth; the
    gap's middle not."""
    s, others = table_of((1.6 * torch.rand(55) - 0.8).tolist()), ~torch.eye(11, dtype=torch.bool)
    noise = 1e-6 * (2 * torch.rand(11, 11) - 1)
    moved = s + noise + noise.T

    def positives(cosine, tau):
        return (cosine <= tau)[others]

    on_a_pair = s[others].quantile(0.5).item()
    assert any(
        not torch.equal(positives(s, on_a_pair), positives(x, on_a_pair))
        for x in (moved, 2 * s - moved)
    )
    for quantile in (0.1, 0.3, 0.5, 0.7, 0.9):
        taus = [quantile_tau(cosine, quantile) for cosine in (s, moved)]
        assert torch.equal(positives(s, taus[0]), positives(moved, taus[1]))
        assert (s[others] - taus[0]).abs().min() > ntk_infonce.ROUNDING / 2


def test_cosines_that_are_equal_but_for_rounding_are_not_parted():
    """Duplicate prompts: the median lies among equal cosines, so the nearest gap is taken."""
    assert quantile_tau(
        table_of([0.1, 0.5, 0.5 + 1e-9, 0.5, 0.5 - 1e-9, 0.9]), 0.5
    ) == pytest.approx(0.3)
    assert quantile_tau(table_of([0.5, 0.5 + 1e-9, 0.5]), 0.5) == 1.0
    assert quantile_tau(table_of([0.2]), 0.5) == 1.0 and quantile_tau(torch.ones(1, 1), 0.5) == 1.0
    for quantile in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match="quantile"):
            quantile_tau(MIXED, quantile)


# --- nothing --------------------------------------------------------------------------------------

NO_TOKEN = torch.zeros(0, dtype=torch.long)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_without_any_token_every_feature_is_zero(n):
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    tables = [
        gradient_cosine(hidden, hidden @ weight.T, NO_TOKEN, NO_TOKEN, n),
        gradient_cosine_chunked(hidden, weight, NO_TOKEN, NO_TOKEN, n, chunk=2),
        cosine(tensor_sketch(hidden, hidden @ weight.T, NO_TOKEN, NO_TOKEN, n, 8)),
        cosine(hidden_mean(hidden, NO_TOKEN, n)),
    ]
    for s in tables:
        assert torch.equal(s, torch.zeros(n, n))
        loss, stats = info_nce(s, quantile_tau(s, 0.5))
        assert loss == 0 and stats["active"] == 0 and all(x.isfinite() for x in stats.values())


def test_a_sample_without_tokens_leaves_other_sketches_alone():
    """A sample without tokens leaves the sketches of the others alone."""
    hidden, logits, y = torch.randn(3, 4), torch.randn(3, 5), torch.tensor([1, 2, 0])
    sketch = tensor_sketch(hidden, logits, y, torch.tensor([0, 2, 2]), 3, 64)
    assert sketch[1].abs().max() == 0 and sketch[[0, 2]].abs().amax(1).min() > 0


def test_weights_of_no_prompt_or_no_token_are_empty():
    """Weights of no prompt or no token are empty. Weights of no response are refused."""
    for choice in ("reference", "best", "advantage", "greedy", "own_prefix"):
        for b, t in ((0, 3), (2, 0)):
            assert feature_weights(
                choice, torch.ones(b, 2, t), torch.ones(b, 2), torch.ones(b, t)
            ).shape == (b, 3, t)
        with pytest.raises(ValueError, match="or G is 0"):
            feature_weights(choice, torch.ones(2, 0, 3), torch.ones(2, 0), torch.ones(2, 3))


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        info_nce(MIXED, 0.5, temperature)


def test_the_control_has_as_many_positives_but_other_ones(double_and_seeded):
    """Membership from permuted cosines, scores from the prompts' own: Eq. 4 written as a loop."""
    f = torch.randn(7, 5)
    cosine, order, tau = ntk_infonce.cosine(f), torch.randperm(7), 0.1
    loss, stats = ntk_infonce.info_nce(cosine, tau, 1.0, order)
    terms = []
    for i in range(7):
        others = [j for j in range(7) if j != i]
        chosen = [j for j in others if cosine[order[i], order[j]] <= tau]
        if chosen and len(chosen) < 6:
            top = sum(cosine[i, j].exp() for j in chosen)
            terms.append(-(top / sum(cosine[i, j].exp() for j in others)).log())
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    plain, usual = ntk_infonce.info_nce(cosine, tau)
    assert stats["positive"] == usual["positive"] and not torch.isclose(loss, plain)
    same, _ = ntk_infonce.info_nce(cosine, tau, 1.0, torch.arange(7))
    assert same == plain
