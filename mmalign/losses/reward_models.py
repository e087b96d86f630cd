"""Losses that train a scorer itself, of which the logps are the scores, and the skew score of a general preference model."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from mmalign.losses.links import (
    PreferenceLoss,
    check_candidates,
    check_not_negative,
    check_positive,
    logistic,
    two_sided,
    weighted,
)


def bradley_terry(
    policy: Float[Tensor, "batch 2"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    margin: Float[Tensor, " batch"] | None = None,
    *,
    ties_at_zero: bool = True,
    centring: float = 0.0,
) -> PreferenceLoss:
    """Bradley-Terry: trains a scorer itself, of which the logps are the scores.

    -q log sigma(d) - (1 - q) log sigma(-d) [- ln 2 where q = 1/2] + centring * (s_best + s_worst)^2
    d = s_best - s_worst - margin,  q = prob

    Strengths of preference enter as published for HelpSteer2-Preference: as `margin` (margin Bradley-Terry) or as `weight`
    (scaled Bradley-Terry, strength 1 to 3). Secrets of RLHF II's adaptive margin is `margin`: the mean over reward models of
    s_best - s_worst. Tree-PLV's loss is this one with a row for every pair of growing prefixes of two sibling paths.

    Source: Bradley & Terry 1952; margin: Touvron et al. 2023 (Llama 2), eq. 2; centring: Eisenstein et al. 2023, as in TRL;
        Wang et al. 2024 (HelpSteer2-Preference); ties: Liang et al. 2024 (SPO), published spm_criterion.py without
        in-batch negatives, which is PickScore's (Kirstain et al. 2023, eq. 2). There each example weighs 1 / (its prompt's
        number of examples), divided by the sum of these weights over the micro-batch of all processes. Here the caller's mean
        is over examples: give weights whose mean is 1. With the mean over the micro-batch this is the published number; with
        the mean over the data set (ours) a loss does not depend on how a batch is split.
    Args:
        policy: scores of the two candidates, the better one first.
        prob: probability that the first candidate is better; 0.5 is a tie. None: 1.
        weight: factor of each pair's loss; see above.
        margin: units of the score that the difference must exceed, per pair.
        ties_at_zero: take ln 2 off a tie, so that the least possible loss is 0. No gradient changes. Published: True.
        centring: coefficient of the squared sum of the two scores, which keeps scores near 0. Published: 0.01 where it is used.
    Raises:
        ValueError: centring is negative.
    """
    check_candidates("bradley_terry", 2, policy)
    check_not_negative("bradley_terry", "centring", centring)
    difference = policy[:, 0] - policy[:, 1]
    losses = logistic(difference if margin is None else difference - margin.to(difference), prob)
    if ties_at_zero and prob is not None:
        losses = losses - math.log(2) * (prob == 0.5).to(losses)
    if centring > 0:
        losses = losses + centring * policy.sum(1) ** 2
    return PreferenceLoss(weighted(losses, weight), policy.detach())


def gpm(
    policy: Float[Tensor, "batch 1"],
    prob: Float[Tensor, " batch"] | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    *,
    tau: float = 0.1,
    form: Literal["logistic", "regression"] = "logistic",
    target: float = 10.0,
) -> PreferenceLoss:
    """General preference model: logistic loss on the skew score of a pair, which need not come from one score a candidate.

    logistic:    -q log sigma(s / tau) - (1 - q) log sigma(-s / tau),                 q = prob
    regression:  q/2 (s / tau - target)^2 + (1 - q)/2 (s / tau + target)^2

    Cyclic preferences (a over b over c over a) have scores here, and none under Bradley-Terry.

    Source: Zhang et al. 2024 (GPM); the regression is a variant of the published code.
    Args:
        policy: skew score s(chosen > rejected) of each pair (`skew_score`).
        prob: probability that the first candidate is better; 0.5 is a tie. None: 1.
        weight: factor of each pair's loss.
        tau: temperature, in units of the score. Published: 0.1.
        form: which of the two. Published: logistic.
        target: regression only: s / tau of a certain preference. Published: 10.
    Raises:
        ValueError: tau or target is not positive.
    """
    check_candidates("gpm", 1, policy)
    for name, value in {"tau": tau, "target": target}.items():
        check_positive("gpm", name, value)
    rewards = policy / tau
    score = rewards[:, 0]
    if form == "logistic":
        losses = logistic(score, prob)
    else:
        losses = two_sided((score - target) ** 2 / 2, (score + target) ** 2 / 2, prob)
    return PreferenceLoss(weighted(losses, weight), rewards.detach())


def prompt_gate(logits: Float[Tensor, "*batch blocks"], *, scaled: bool = True) -> Float[Tensor, "*batch blocks"]:
    """Weight of each two-dimensional block of a preference embedding, from a linear head on the prompt's last hidden state.

    scaled: blocks * softmax(logits), whose mean is 1; else softmax(logits)

    Source: Zhang et al. 2024 (GPM), published code: the training file scales, the inference example does not.
    Args:
        logits: output of the head; the training file divides it by sqrt(hidden size).
        scaled: as the training file (True) or the inference example (False).
    """
    gate = torch.softmax(logits, -1)
    return gate * logits.shape[-1] if scaled else gate


def skew_score(
    first: Float[Tensor, "*batch dim"],
    second: Float[Tensor, "*batch dim"],
    gate: Float[Tensor, "*batch blocks"] | None = None,
    *,
    normalised: bool = True,
) -> Float[Tensor, "*batch"]:
    """How much more the first candidate is preferred: antisymmetric in the two, and zero of a candidate against itself.

    s(i > j) = sum over blocks b of g_b (e_i[2b] e_j[2b + 1] - e_i[2b + 1] e_j[2b])

    Source: Zhang et al. 2024 (GPM), with the rotation by 90 degrees in each block.
    Args:
        first, second: preference embeddings of even dimension.
        gate: weight of each block (`prompt_gate`); None: 1.
        normalised: divide each embedding by its L2 norm first, as the paper; the published training file does not.
    Raises:
        ValueError: the dimension is odd.
    """
    if first.shape[-1] % 2:
        raise ValueError(f"skew_score: got embeddings of dimension {first.shape[-1]}, want an even one.")
    if normalised:
        first, second = normalize(first, dim=-1), normalize(second, dim=-1)
    turned = first[..., 0::2] * second[..., 1::2] - first[..., 1::2] * second[..., 0::2]
    return (turned if gate is None else turned * gate).sum(-1)


def mean_skew_scores(
    embeddings: Float[Tensor, "batch k dim"], gate: Float[Tensor, "batch blocks"] | None = None, *, normalised: bool = True
) -> Float[Tensor, "batch k"]:
    """Mean skew score of each candidate against the others of its prompt: the `scores` of the loss `gpo`.

    s_i = 1/(k - 1) * sum over j != i of s(i > j)

    Source: Zhang et al. 2024 (GPM).
    Args:
        embeddings: preference embeddings of the candidates.
        gate, normalised: as in `skew_score`.
    Raises:
        ValueError: there is nothing to compare a candidate with, or the dimension is odd.
    """
    k = embeddings.shape[1]
    if k < 2:
        raise ValueError(f"mean_skew_scores: got {k} candidates a prompt, want at least 2.")
    shape = (len(embeddings), k, k, -1)
    gates = None if gate is None else gate[:, None, None, :].expand(*shape)
    scores = skew_score(embeddings[:, :, None].expand(*shape), embeddings[:, None].expand(*shape), gates, normalised=normalised)
    return scores.sum(2) / (k - 1)  # s(i > i) = 0
