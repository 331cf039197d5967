"""The tests of the tests: each named fault, one line in a scratch copy, must be caught.

pytest -m mutation        # more than an hour; the plain `pytest` only looks for their places
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str = ""  # -k expression, where the whole test file would take long
    where: str = ""  # the test file, where it is not the source's own

    @property
    def test_file(self) -> str:
        return self.where or Path(self.file).name


FAULTS = [
    # Eq. 1
    Fault("sign of the KL", "grpo", "per_token + beta * kl", "per_token - beta * kl"),
    Fault("sign of the surrogate, as printed", "grpo", "-clipped_surrogate(logp, old", "clipped_surrogate(logp, old"),
    Fault("pi_ref in the ratio", "grpo", "-clipped_surrogate(logp, old_logp, adv", "-clipped_surrogate(logp, old_logp if ref_logp is None else ref_logp, adv"),
    Fault("max for min", "grpo", "torch.minimum(rho", "torch.maximum(rho"),
    Fault("clip bounds exchanged", "grpo", "rho.clamp(1 - eps_low, 1 + eps_high)", "rho.clamp(1 - eps_high, 1 + eps_low)"),
    Fault("ratio upside down", "grpo", "rho = _exp(logp - old_logp)\n    adv =", "rho = _exp(old_logp - logp)\n    adv ="),
    Fault("x of the KL upside down", "grpo", "x = ref_logp - logp", "x = logp - ref_logp"),
    Fault("rho carries no gradient", "grpo", "(logp - logp.detach()).exp() * k3", "(logp.detach() - logp.detach()).exp() * k3"),
    Fault("population std", "grpo", "keepdim=True) / (count - 1).clamp_min(1)", "keepdim=True) / count.clamp_min(1)"),
    Fault("no eps", "grpo", "(variance.masked_fill(tied, 1.0).sqrt() + eps)", "variance.masked_fill(tied, 1.0).sqrt()"),
    Fault("batch mean for group mean", "grpo", "torch.where(known, rewards - mean, 0.0)", "torch.where(known, rewards - rewards.nanmean(), 0.0)"),
    Fault("unknown counts as 0", "grpo", "known = ~rewards.isnan()\n    count", "known = rewards == rewards.nan_to_num_()\n    count"),
    Fault("an unknown component counts as 0", "grpo", "reward.nanmean(1, keepdim=True).nan_to_num(0.0)", "0.0"),
    Fault("rank mean of means (token)", "grpo", "return mask / tokens", "return mask / mask.sum()"),
    Fault("rank mean of means (sequence)", "grpo", "clamp_min(1) * sequences)", "clamp_min(1) * len(mask))"),
    Fault("padding is scored", "grpo", "(torch.where(real, x, 0.0) for x in (logp, old_logp))", "(logp, old_logp)"),
    # Eq. 2 and entropy
    Fault("dead zone on both sides", "grpo", "((adv < 0) & (rho < 1 - eps_low))", "((adv < 0) & ((rho - 1).abs() > eps_low))"),
    Fault("Eq. 2 as printed", "grpo", "-_exp(logp - old_logp) * adv, 0.0)", "-logp.exp() * adv, 0.0)"),
    Fault("KL left out of Eq. 2", "grpo", "strength + beta * (1 - _exp(ref_logp - logp))", "strength"),
    Fault("residual upside down", "grpo", "(F.one_hot(target, logits.shape[-1]) - log_pi.exp())", "(log_pi.exp() - F.one_hot(target, logits.shape[-1]))"),
    Fault("the paper's sentence: C forgotten", "grpo", "(s_y - (probs * s).sum(-1))", "s_y"),
    Fault("H forgotten in s", "grpo", "probs * (log + entropy[..., None])", "probs * log"),
    Fault("p* is 1 / perplexity", "grpo", "return (w - entropy).exp()", "return (-entropy).exp()"),
    Fault("Newton stops early", "grpo", "for _ in range(8)", "for _ in range(2)"),
    # Eq. 3
    Fault("transposed K", "ntk_infonce", '"mvp,lwp->mvlw", a, b', '"mvp,lwp->mvlw", b, a'),
    Fault("softmax Jacobian left out", "ntk_infonce", "lr * (dz - (pi_o * dz).sum(-1, keepdim=True))", "lr * dz"),
    Fault("softmax Jacobian transposed", "ntk_infonce", "(pi_o * dz).sum(-1, keepdim=True)", "pi_o * dz.sum(-1, keepdim=True)"),
    Fault("advantage left out", "ntk_infonce", "force = adv.expand(len(pi_u))[:, None] * (", "force = ("),
    # Eq. 4
    Fault("residual without - pi", "ntk_infonce", "torch.where(hit, others.sum(-1, keepdim=True), -others)", "hit.to(pi)"),
    Fault("1 - pi as a difference", "ntk_infonce", "torch.where(hit, others.sum(-1, keepdim=True), -others)", "hit.to(pi) - pi"),
    Fault("hidden states forgotten", "ntk_infonce", "(residual_gram * (hidden @ hidden.T))", "residual_gram"),
    Fault("not normalised", "ntk_infonce", "return inverse_norm[:, None] * gram * inverse_norm[None]", "return gram"),
    Fault("positives and negatives exchanged", "ntk_infonce", "(decides.clamp(-1, 1) <= tau)", "(decides.clamp(-1, 1) > tau)"),
    Fault("diagonal left in", "ntk_infonce", "others = ~torch.eye(n, dtype", "others = torch.ones(n, n, dtype"),
    Fault("temperature forgotten", "ntk_infonce", "scores = cosine / temperature", "scores = cosine"),
    Fault("inactive anchors in the mean", "ntk_infonce", "/ active.sum().clamp_min(1)", "/ n"),
    Fault("official fall-back", "ntk_infonce", "    active = positive.any(1)", "    positive |= others & (cosine == cosine.masked_fill(~others, 9).amin(1, True)) & ~positive.any(1, True)\n    active = positive.any(1)"),
    Fault("one hash for all seeds", "ntk_infonce", "manual_seed(seed)", "manual_seed(0)"),
    Fault("sketches added, not convolved", "ntk_infonce", "targets)) * spectrum(", "targets)) + spectrum("),
    Fault("chunks hit their first tokens", "ntk_infonce", "(targets - first)[:, None]", "targets[:, None]"),
    Fault("log-sum-exp per chunk", "ntk_infonce", "-(z - norm[:, None]).exp()", "-z.softmax(-1)"),
    Fault("worst for best", "ntk_infonce", "best = adv.argmax(1)", "best = adv.argmin(1)"),
    # selection
    Fault("population variance", "variance_select", "squares / (count - 1).clamp_min(1)", "squares / count.clamp_min(1)"),
    Fault("unknown rewards count as 0", "variance_select", "rewards = rewards.sort(1)", "rewards = rewards.nan_to_num(0.0).sort(1)"),
    Fault("lowest variance first", "variance_select", "sorted((-v, i)", "sorted((v, i)"),
    Fault("tied prompts are kept", "variance_select", "for v, i in of_kind if v > 0)", "for v, i in of_kind)"),
    # sampling and scoring
    Fault("end token dropped from the mask", "engine/vlm", "(is_end.cumsum(2) - is_end.int()) == 0", "is_end.cumsum(2) == 0", "end_token"),
    Fault("off-by-one shift", "engine/vlm", "last = own.split(lengths, 1), prompt[:, -1:]", "last = own.split(lengths, 1), prompt[:, -2:-1]", "equal_plain_rows"),
    Fault("branches see each other", "engine/shared_prefix", "(branch[k] == 0) | (branch[k] == branch[q])", "(branch[k] >= 0) | (branch[k] == branch[q])", "equal_plain_rows", "vlm"),
    Fault("branch positions start one early", "engine/vlm", "start = position[0, :, -1] + 1", "start = position[0, :, -1]", "equal_plain_rows"),
    Fault("sampled at T = 0.7", "engine/shared_prefix", "at_least_float32(scores).softmax(-1)", "(at_least_float32(scores) / 0.7).softmax(-1)", "sampled_from", "vlm"),
    Fault("the tail of the vocabulary is never sampled", "engine/shared_prefix", "passed = u * edges[:, -1:]", "passed = u * 0.9 * edges[:, -1:]", "sampled_from", "vlm"),
    Fault("banned tokens are scored", "engine/shared_prefix", "z = at_least_float32(h @ weight.T).add_(bias)\n", "z = at_least_float32(h @ weight.T)\n", "banned or equal_plain_rows", "vlm"),
    Fault("banned tokens have a gradient", "engine/shared_prefix", ".add_(bias).softmax(-1)", ".softmax(-1)", "equal_plain_rows", "vlm"),
    Fault("gradient of log pi without - pi", "engine/shared_prefix", ".mul_(-g / ", ".mul_(0 / ", "equal_plain_rows", "vlm"),
    Fault("branches do not see the prompt", "engine/shared_prefix", "group(query), group(key, k), group(value, v), mask.own", "group(query), group(key), group(value), mask.own[..., k.shape[2] :]", "equal_plain_rows", "vlm"),
    Fault("padding of a group is seen", "engine/shared_prefix", "padding_value=length,", "padding_value=p,", "groups", "vlm"),
    Fault("groups lose the padded prompt's mask", "engine/shared_prefix", "of_prompt.expand(len(place), -1)", "of_prompt[:, -1:].expand(len(place), p)", "groups", "vlm"),
    Fault("groups of another prompt", "engine/shared_prefix", "own.unflatten(0, (-1, n)).flatten(1, 2)", "own.unflatten(0, (n, -1)).transpose(0, 1).flatten(1, 2)", "groups", "vlm"),
    Fault("static room is seen before it is filled", "engine/shared_prefix", "device=own.device) > at", "device=own.device) > at + 1", "same_numbers", "vlm"),
    Fault("static steps stay in their place", "engine/static_decode", "        self.position += 1\n", "", "same_numbers", "vlm"),
    Fault("cache rows overwritten", "engine/shared_prefix", "self.keys[..., self.filled : end, :] = key_states", "self.keys[..., :1, :] = key_states", "greedy", "vlm"),
    Fault("completions attend to the prompt's padding", "engine/shared_prefix", "shared.masked_fill(hidden, torch.finfo(shared.dtype).min)", "shared", "greedy or same_numbers", "vlm"),
    Fault("the wrong cache rows leave", "engine/vlm", "layer.keep(rows.flatten())", "layer.keep(rows.flatten().flip(0))", "same_numbers"),
    Fault("numbers stay when completions leave", "engine/vlm", "draws.gather(1, kept[..., None].expand_as(draws[:, :left]))", "draws[:, :left]", "same_numbers"),
    Fault("positions of the leaving", "engine/vlm", "delta.repeat_interleave(left)", "delta.repeat(left)", "same_numbers"),
    Fault("weights of the prompt for own tokens", "engine/shared_prefix", "by_completion(weights[..., p:]) @ at_least_float32(value)", "by_completion(weights[..., p:].mean(-1, True)).expand(-1, -1, -1, value.shape[2]) @ at_least_float32(value)", "greedy", "vlm"),
    Fault("plain rows start one early", "engine/vlm", "hidden[:, p - 1 : -1].unflatten", "hidden[:, p - 2 : -2].unflatten", "4_d"),
    # how train.py puts them together
    Fault("targets shifted by one", "conflict", "rollouts.branches[:, -scored:][where]", "rollouts.branches.roll(1, -1)[:, -scored:][where]", "autograd_gradient", "train"),
    Fault("weights of f left out", "conflict", "return scores.hidden[where], weights[where],", "return scores.hidden[where], weights[where] ** 0,", "autograd_gradient", "train"),
    Fault("another prompt's answer", "conflict", "for s in samples]\n        return policy", "for s in reversed(samples)]\n        return policy", "autograd_gradient", "train"),
    Fault("head trained in every pass", "conflict", "self.policy.head(trained)", "self.policy.head()", "written_out", "train"),
    Fault("advantages to the wrong responses", "train", "part.adv.flatten()", "part.adv.T.flatten()", "written_out"),
    Fault("sign of Eq. 4", "train", "+ cfg.nce_weight * nce", "- cfg.nce_weight * nce", "written_out"),
    Fault("tau and temperature not passed on", "train", "cosine, tau, cfg.nce_temperature, conflict", "cosine, 0.54, 1.0, conflict", "written_out"),
    Fault("mean of the passes' means", "train", "cfg.grpo_options | global_counts(micro_batches, run)", "cfg.grpo_options", "written_out"),
    Fault("old log-probs follow the policy", "train", "logp.detach() if part.old_logp is None else part.old_logp", "logp.detach()", "baselines_and_lora"),
    Fault("all prompts draw the same numbers", "engine/shared_prefix", 'f"{when}/{name}"', 'f"{when}"', "chance", "train"),
    Fault("half a batch is lost with memory", "engine/run", "return self.local_micro_batches(batch, 0, work, *args)", "return self.local_micro_batches(batch[: self.micro_batch_limit], 0, work, *args)", "where_memory", "train"),
    Fault("half a gradient is added to the next attempt's", "engine/learner", "            self.optimizer.zero_grad()\n            self.losses = []\n            most", "            self.losses = []\n            most", "less_memory", "train"),
    Fault("old log-probs of another response", "rollouts", "x.unflatten(0, (len(self), -1))[rows].flatten(0, 1)", "x[: len(x) // len(self) * len(range(len(self))[rows])]", "less_memory", "train"),
    Fault("gradients are summed in half precision", "engine/learner", "slot.grad.add_(p.grad)", "(slot.grad + p.grad).to(p.dtype).float()", "add_up_in_float32", "train"),
    Fault("a failed attempt's numbers stay", "preference", "numbers.update(before)", "pass", "plain_rows"),
    # many processes, and nothing lost
    Fault("the gradients of one process", "engine/run", "torch.distributed.all_reduce(p.grad)", "pass", "two-plain", "processes"),
    Fault("the mean over processes for their sum", "engine/learner", "backward(loss * self.run.processes)", "backward(loss)", "two-plain", "processes"),
    Fault("head trained in every process", "conflict", "trained = (not self.run or self.run.is_main) and i ==", "trained = i ==", "two-plain", "processes"),
    Fault("denominators of one process", "rollouts", "total = run.all_reduce(torch.stack([sequences, tokens]))", "total = torch.stack([sequences, tokens])", "two-plain", "processes"),
    Fault("another hash in each process", "conflict", 'self.seed = random.Random(f"{cfg.seed}/{step}")', 'self.seed = random.Random(f"{cfg.seed}/{run and run.rank}")', "two-passes", "processes"),
    Fault("others' f_i in another order", "conflict", "(self.run.rank if self.run else 0) * len(self.micro_batches) + i", "i", "two-plain", "processes"),
    Fault("a checkpoint without moments", "engine/learner", 'tensors |= {f"{key}/{name}": value for', '{f"{key}/{name}": value for', "killed_in_every", "nothing_lost"),
    Fault("the rate starts again", "engine/learner", "self.schedule.load_state_dict(", "dict(", "killed_in_every", "nothing_lost"),
    Fault("an update that is not finite counts", "engine/learner", "if run.all_reduce(torch.tensor(bad, device=run.device)) == 0:", "if True:", "not_finite", "nothing_lost"),
    Fault("what is half written looks whole", "engine/run", 'temporary = folder.with_name(f".{folder.name}.unfinished")', "temporary = folder", "a_checkpoint_that_fails", "nothing_lost"),
    Fault("a checkpoint of another model is taken", "engine/checkpoint", "if there != set(like):", "if False:", "of_another_model", "nothing_lost"),
    # options that must arrive, and what went wrong without a word
    Fault("clipped at 1e9", "engine/run", "clip_grad_norm_(parameters, max_norm)", "clip_grad_norm_(parameters, 1e9)", "clipped", "wiring"),
    Fault("eps_high not passed on", "config", '"beta", "eps_low", "eps_high", "kl_kind", "loss_norm"', '"beta", "eps_low", "kl_kind", "loss_norm"', "loss_is", "wiring"),
    Fault("kl_kind not passed on", "config", '"beta", "eps_low", "eps_high", "kl_kind", "loss_norm"', '"beta", "eps_low", "eps_high", "loss_norm"', "loss_is", "wiring"),
    Fault("loss_norm not passed on", "config", '"beta", "eps_low", "eps_high", "kl_kind", "loss_norm"', '"beta", "eps_low", "eps_high", "kl_kind"', "loss_is", "wiring"),
    Fault("max_tokens dropped", "config", ' | {"max_tokens": self.max_new_tokens}', "", "loss_is", "wiring"),
    Fault("keep fixed", "selection", "variance, cfg.keep, within)", "variance, 0.5, within)", "selection_keeps", "wiring"),
    Fault("weight of the accuracy fixed", "config", '{"accuracy": self.accuracy_weight,', '{"accuracy": 1.0,', "loss_is", "wiring"),
    Fault("weight of the format fixed", "config", '"format": self.format_weight}', '"format": 0.1}', "loss_is", "wiring"),
    Fault("weight of the caption fixed", "config", '{"caption": self.caption_weight,', '{"caption": 1.0,', "loss_is", "wiring"),
    Fault("the schedule's total without iterations", "engine/learner", 'total = steps * (cfg.iterations if stage == "rl" else 1)', "total = steps", "optimiser_is", "wiring"),
    Fault("no warm-up", "engine/learner", "warmup=round(cfg.warmup * total)", "warmup=0", "optimiser_is", "wiring"),
    Fault("no weight decay", "engine/learner", "weight_decay=cfg.weight_decay, fused", "weight_decay=0.0, fused", "optimiser_is", "wiring"),
    Fault("the rate stays", "engine/learner", "        self.schedule.step()\n", "", "optimiser_is", "wiring"),
    Fault("the first update has rate 0", "engine/learner", "return (update + 1) / warmup", "return update / warmup", "rate_begins", "train"),
    Fault("norms and biases decay", "engine/learner", '        groups[1]["weight_decay"] = 0.0\n', "", "weight_decay_acts", "train"),
    Fault("one order for all epochs", "engine/learner", "self.run.permutation(self.stage, epoch, n)", "self.run.permutation(self.stage, 0, n)", "every_epoch", "train"),
    Fault("a prompt twice in a batch", "engine/learner", "left = set(order[n - epoch * n % size :])", "left = set()", "every_epoch", "train"),
    Fault("epochs of batches that are not cut", "engine/learner", "max(1, batch_size(rows, batch, processes))", "min(batch, rows)", "epochs_stand", "train"),
    Fault("rows held out in the file's order", "train", 'random.Random(f"{seed}/held out").sample(rows, len(rows))', "rows", "held_out_are_of"),
    Fault("unknown is 0 in the held-out reward", "train", "return sum(found) / len(found)", "return sum(x for x in found if x == x) / len(found)", "held_out_reward"),
    Fault("missing verdicts are not asked for again", "selection", 'lambda line: line["known"] == cfg.responses', "lambda line: True", "asked_for_again", "train"),
    Fault("prompts without verdicts are ranked", "selection", 'if 2 * line["known"] >= cfg.responses]', "]", "without_verdicts", "train"),
    Fault("categories are forgotten", "selection", "within = [kind[i] for i in ids] if cfg.select_within else None", "within = None", "by_category", "train"),
    Fault("another class is kept", "selection", 'if line["class"] == cfg.select_class]', 'if line["class"] != cfg.select_class]', "of_the_class", "train"),
    Fault("variance of the other run's rewards", "selection", "score_lines(some, tables, cfg)", "lines", "takes_over", "train"),
    Fault("any cold start is shared", "selection", "if there.get(k) != getattr(cfg, k)]", "if False]", "another_cold_start", "train"),
    Fault("the control is the loss itself", "ntk_infonce", "cosine.detach()[order][:, order]", "cosine.detach()"),
    Fault("a caption that names what is not there is right", "measures", 'not row["answerable"] or bool(row.get("hallucinated"))', 'not row["answerable"]', "behind", "eval"),
    Fault("the slope is over all rows at once", "measures", "return both, sum((a - a_mean) ** 2 for _, a in known)", "return both, sum(a**2 for _, a in known)", "slope", "eval"),
    Fault("the blind control shows the row's own", "measures", "media=other.media, sizes=other.sizes", "media=s.media, sizes=s.sizes", "blind", "eval"),
    Fault("the two flaws of a row come together", "world/scenes", "for flaw in (FLAW_CAPTION, FLAW_ANSWER)", "for flaw in (FLAW_CAPTION, FLAW_CAPTION)", "cold_start", "world"),
    Fault("a world of another version is taken", "world/__init__", "    if there != made and not all(", "    if not there and not all(", "another_world", "world"),
    Fault("an interval of the normal law", "replication/page", "STUDENT[min(n - 2, len(STUDENT) - 1)]", "1.96", "verdict", "reproduce"),
    Fault("results of two codes are mixed", "replication/page", "if value_ != expected:", "if False:", "never_mixed", "reproduce"),
    Fault("a tie within a hundredth", "variance_select", "< 1e-6).all(1)", "< 1e-2).all(1)"),
    Fault("kinds are kept together", "variance_select", "for v, i, k in rows if k == kind]", "for v, i, k in rows]"),
    Fault("tau on a pair's cosine", "ntk_infonce", "((pairs[k] + pairs[k + 1]) / 2)", "pairs[k]", "rounding or quantile"),
    Fault("equal cosines are parted", "ntk_infonce", ".masked_fill(gaps <= ROUNDING, torch.inf)", "", "equal_but_for"),
    Fault("no token, no sketch", "ntk_infonce", "if not len(hidden):", "if len(hidden):", "sketch"),
    Fault("an adapter is always merged", "engine/pretrained", "if full or not stays(", "if True or not stays(", "stays_one", "vlm"),
    Fault("the reference of LoRA is always the base", "engine/vlm", "if REFERENCE in adapters:", "if False:", "stays_one", "vlm"),
    Fault("every part has the first pictures", "engine/vlm", "sum(tokens[: rows.start]), sum(tokens[rows])", "0, sum(tokens[rows])", "rows_of_a_batch", "vlm"),
    Fault("the prompt's part of the gradient is lost", "engine/learner", "            prefix.backward()", "            pass", "written_out", "train"),
    Fault("Eq. 4 in every pass", "train", " and is_last", "", "written_out", "train"),
    Fault("two processes in a run folder", "engine/run", "if refused := self.from_main(self._lock):", "if refused := None:", "folder_in_use", "run"),
    Fault("LoRA's scale is 1", "engine/pretrained", "lora_alpha=2 * lora_rank", "lora_alpha=lora_rank", "adapter_adds", "vlm"),
    Fault("dropout in scoring", "engine/pretrained", "    _without_dropout(core)\n", "", "dropout", "vlm"),
    Fault("a checkpoint's settings act in sampling", "engine/vlm", ", plain_generation(core):", ":", "ships"),
    Fault("rows without a token are sampled", "engine/vlm", "return sorted(control | nothing)", "return sorted(control)", "without_a_token"),
    Fault("control tokens are sampled", "engine/vlm", "control -= {None, *end_ids}", "control = set()", "banned"),
    Fault("stage tags that are special vanish", "engine/vlm", "decode(row[keep])", "decode(row[keep], skip_special_tokens=True)", "special"),
    Fault("padding sees nothing", "engine/vlm", 'if attention == "eager"', "if False", "padded_prompt"),
    Fault("a file of another age is not opened", "engine/media", "stat.st_size, stat.st_mtime_ns", "stat.st_size", "until_it_changes"),
    Fault("a file of another size is not opened", "engine/media", "str(medium), stat.st_size, stat", "str(medium), stat", "until_it_changes"),
    Fault("what was a picture is a clip", "engine/media_check", "repr((data_type, *trace(", "repr((0, *trace(", "no_clip_because", "media"),
    Fault("an interrupted check is lost", "engine/media_check", "if kind is None else self.before | self.now", "if kind is None else self.before", "interrupted", "media"),
    Fault("what is gone is kept", "engine/media_check", "self.now if kind is None else", "", "interrupted", "media"),
    Fault("a long check keeps nothing before its end", "engine/media_check", "if time.monotonic() - self.saved > 60:", "if False:", "long_check", "media"),
    Fault("media are opened one by one", "engine/media_check", "ThreadPoolExecutor(os.cpu_count())", "ThreadPoolExecutor(1)", "side_by_side", "media"),
    Fault("joined files are half a clip", "engine/video", "time < before - 1:", "False:", "joined", "media"),
    Fault("half a clip is a short one", "engine/video", "> 1 + length / 10:", "> 10**9:", "cut_off", "media"),
    Fault("X-rays are negatives", "engine/media", "1 - share if tags.get(262) == 0 else share", "share", "0_is_white"),
    Fault("nothing measured is black", "engine/media", " | np.isin(values, NOTHING)", "", "measured"),
    Fault("1,2 is 12", "engine/rows", 'if not answers.NUMBER.fullmatch(gold.removesuffix(".")):', "if False:", "could_be_another", "data"),
    Fault("letters out of order", "engine/rows", "sorted(bare) == list(letters)", "False", "could_mislead", "data"),
    Fault("every process opens all", "engine/run", "        first = self.accelerator.is_local_main_process\n", "        first = True\n", "opens_the_media", "processes"),
    Fault("a packet that is cut off passes", "engine/video", "if packet.is_corrupt:", "if False:", "end_is_missing", "data"),
    # run.py
    Fault("nothing binds a folder", "engine/run", "differ = [k for k in now if k not in free and then[k] != now[k]]", "differ = []"),
    Fault("a folder of something else is taken", "engine/run", "    elif begun:\n", "    elif False:\n"),
    Fault("any judge may take another's place", "engine/run", 'if all(is_url(each.get("judge") or "") for each in (then, now)):', "if True:"),
    Fault("what may change binds", "config", "select_batch: int = option(16, low=1, resumable=True", "select_batch: int = option(16, low=1", "", "run"),
    Fault("what was half deleted stays", "engine/run", 'for ending in ("unfinished", "gone"):', 'for ending in ("unfinished",):'),
    Fault("chance without the seed", "engine/run", 'random.Random(f"{self.cfg.seed}/{where}")', 'random.Random(f"{where}")'),
    Fault("one chance for all steps", "engine/run", 'random.Random(f"{self.cfg.seed}/{where}")', 'random.Random(f"{self.cfg.seed}")'),
    Fault("orders without the seed", "engine/run", 'random.Random(f"{self.cfg.seed}/{key}")', 'random.Random(f"{key}")'),
    Fault("lines twice", "engine/run", 'for line in found if line["id"] not in done)', "for line in found)"),
    Fault("what is done is done again", "engine/run", " if not done.issuperset(item.id for item in c)]", "]"),
    Fault("a cut line stays", "engine/files", "if rest and repair:", "if False:", "", "run"),
    Fault("lines that are not wanted stay", "engine/run", "if wanted(line)]", "]"),
    Fault("sums for means", "engine/run", "value / (count or 1)", "value"),
    Fault("nothing counted is 0", "engine/run", 'if count or name == "loss"', ""),
    Fault("NaN in the metrics", "engine/run", "if math.isfinite(value)}", "}"),
    Fault("more processes than GPUs", "engine/run", "if gpus and here > gpus or not gpus and here > max(4, cores):", "if not gpus and here > max(4, cores):"),
    Fault("FSDP1 is taken", "engine/run", 'if env.get("FSDP_VERSION") != "2":', "if False:"),
    Fault("DeepSpeed is taken", "engine/run", 'if env.get(f"ACCELERATE_USE_{name}") == "true":', "if False:"),
    Fault("batches that do not split", "engine/run", "if getattr(cfg, name, 0) % processes:", "if False:"),
    Fault("other rows go on", "engine/run", "        if then != rows:\n", "        if False:\n", "rows_or_pictures", "train"),
    Fault("media that were read ahead are read again", "data", "    if media is None:\n", "    if True:\n", "read_once", "loader"),
    Fault("what is resized is resized again", "engine/loader", ' or "resized" in part', "", "", "loader"),
    Fault("an error comes with its worker's traceback", "engine/loader", "        return error\n", "        raise\n", "breaks", "loader"),
    Fault("long prompts beside short ones", "engine/run", "by_length = sorted(batch, key=lambda row: row.length)", "by_length = batch", "prompts_of_a_length", "train"),
    Fault("another judge's replies", "engine/judges", ' if x["judge"] == judge', "", "journal", "train"),
    # the judge
    Fault("a failed judge earns 0", "caption_reward", 'return float("nan"), None', "return 0.0, None"),
    Fault("a checkpoint in part is taken", "engine/pretrained", "    refuse_part(loaded)\n", "", "load_in_part", "vlm"),
    Fault("any end is a whole reply", "engine/judges", "if reason not in COMPLETE:", "if False:", "", "caption_reward"),
    Fault("nothing behind a thought is wrong", "caption_reward", "or (thoughts and not answer)", ""),
    Fault("an empty caption is judged", "caption_reward", "for q, c, _, _ in items if c}", "for q, c, _, _ in items}"),
    # the neighbours
    Fault("sigma of the population", "ovip", ".double().std().item()", ".double().std(correction=0).item()"),
    Fault("the good one need not be good", "ovip", " and high > tau_pos", ""),
    Fault("the last of equal scores", "ovip", "one[1]))\n    pairs", "-one[1]))\n    pairs"),
    Fault("one sigma for two", "ovip", "max(delta, 2 * sigma)", "max(delta, sigma)"),
    Fault("DPO upside down", "ovip", "(pos - ref_pos) - (neg - ref_neg)", "(neg - ref_neg) - (pos - ref_pos)"),
    Fault("the image-free term against the image", "ovip", "-logsigmoid(beta1 * (image - none)) - ", "-logsigmoid(beta1 * (none - image)) - "),
    Fault("the negative image is preferred", "ovip", "- logsigmoid(beta2 * (none - other))", "- logsigmoid(beta2 * (other - none))"),
    Fault("its own picture", "corruption", "if shown != own:", "if True:"),
    Fault("a picture for a clip", "corruption", "return row.data_type, len(row.media)", "return len(row.media)", "clips_get_clips", "stress"),
    Fault("the input is covered itself", "corruption", 'covered = image.convert("RGB")', "covered = image"),
    Fault("the picture of a row beside it", "corruption", "append((shown[row.id], row))", "append((row.id, row))", "", "stress"),
    Fault("the question stays", "corruption", "stays = FORM.search(sentence) and not ASKS.search(sentence)", "stays = FORM.search(sentence)"),
    Fault("the hint is right", "corruption", " and not any(_same(w, r) for r in right)", ""),
    Fault("rows of one picture are independent", "stress", "sums[question.cluster] +=", "sums[question.id] +="),
    Fault("a bare answer as A+", "preference", "if pairs and pairs[0][0] is None and not has_reference(sample):", "if False:", "hold_the_tokens"),
    Fault("the image-free row has its image", "preference", "policy.encode([without_media(turn) for turn in turns])", "policy.encode(turns)", "plain_rows"),
    Fault("a pair without an image is trained on", "preference", "torch.where(weight > 0, loss, 0.0)", "loss", "plain_rows"),
    Fault("a mean over this rank's pairs", "preference", ".sum() / total", ".sum() / len(pairs)", "plain_rows"),
    Fault("the buffer is forgotten", "preference", '{"buffer": [vars(pair) for pair in buffer]}', "{}", "killed"),
    Fault("pairs are trained on again", "preference", "if i not in chosen", "", "gives_each_pair"),
    Fault("equal responses count twice", "preference", "if text not in texts[:i]", "", "distinct"),
    Fault("any score is high enough", "ovip", " and high >= 6", ""),
    Fault("a negative score is one", "ovip", r"(?: is)?[^\w\n-]", r"(?: is)?[^\w\n]"),
    Fault("the gain of the wrong sign", "caption_reward", "(r - b, reply)", "(b - r, reply)", "gain_is", "rewards"),
    Fault("only its own question", "rewards", "s.problem_type), *s.others)]", "s.problem_type),)]", "shared_is"),
    Fault("a cut-off reply of its own is unknown", "engine/judges", "if ended else None) or \"\")", "if ended else None))", "policy_judges", "rewards"),
    Fault("an infinite reward", "rewards", " or table.isinf().any()", "", "bad_reward"),
    Fault("an own reward weighs nothing", "rewards", "dict.fromkeys(rewards, 1.0)", "dict.fromkeys(rewards, 0.0)", "ones_own"),
    Fault("half a description is drawn", "world/scenes", "    if not all(found):\n", "    if not any(found):\n", "described_scene", "preference"),
    Fault("always at T = 1", "engine/shared_prefix", "for warper in self.warpers:", "for warper in ():", "nucleus", "preference"),
    Fault("AdamW without float32 copies", "engine/memory", "trained * 4 * (3 if size == 2 else 2)", "trained * 4 * 2", "documented", "dry_run"),
    Fault("a clip is one picture", "engine/memory", "math.ceil(cfg.max_frames / 2) if clips else 1", "1", "clip", "dry_run"),
    Fault("peft's float32 inputs are forgotten", "engine/memory", "if cfg.lora_rank and size == 2:\n        # peft", "if False:\n        # peft", "autograd_saves", "dry_run"),
    Fault("a card's last byte can be used", "engine/memory", "if need(changes, shards) > USABLE * card or", "if need(changes, shards) > card or", "would_fit", "dry_run"),
    Fault("judge calls of one evaluation", "dry_run", "    calls = times * tests", "    calls = tests", "does_what"),
    Fault("an update's memory limits sampling", "engine/learner", "n = self.limit = (most + 1) // 2", "n = self.limit = run.micro_batch_limit = (most + 1) // 2", "less_memory", "train"),
    Fault("a part has the whole's inputs", "rollouts", "return vlm.rows_of(x, rows)", "return x", "part_of_rollouts", "train"),
    Fault("a drop is a rise", "stress", "one[q.id] - two[q.id]", "two[q.id] - one[q.id]"),
]  # fmt: skip


def test_every_fault_has_its_place_and_a_name_of_its_own():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 20
    for fault in FAULTS:
        assert (ROOT / f"{fault.file}.py").read_text().count(fault.old) == 1, fault.name


def run(folder, file, expression=""):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        f"tests/test_{file}.py",
    ]
    command += ["-k", expression] if expression else []
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch") / "copy"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "runs", "shapes-world", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


@pytest.mark.mutation
@pytest.mark.parametrize("file", sorted({fault.test_file for fault in FAULTS}))
def test_without_a_fault_the_copy_passes(copy, file):
    expression = " or ".join(
        {fault.tests for fault in FAULTS if fault.test_file == file and fault.tests}
    )
    done = run(copy, file, expression)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.mutation
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: re.sub(r"\W+", "-", fault.name))
def test_the_fault_is_caught(copy, fault):
    path = copy / f"{fault.file}.py"
    whole = path.read_text()
    path.write_text(whole.replace(fault.old, fault.new))
    try:
        done = run(copy, fault.test_file, fault.tests)
    finally:
        path.write_text(whole)
    assert done.returncode == 1 and " failed" in done.stdout, (
        f"{fault.name} was not caught\n{done.stdout[-2000:]}"
    )
