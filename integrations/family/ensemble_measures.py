"""What an ensemble is measured by: averages of predictions, disagreement of members, calibration. Functions of tensors.

Sources: Lakshminarayanan, Pritzel, Blundell: "Simple and Scalable Predictive Uncertainty Estimation using Deep
Ensembles", NeurIPS 2017 (probabilities are averaged); Gal: "Uncertainty in Deep Learning", 2016 (mutual information,
variation ratio); Guo, Pleiss, Sun, Weinberger: "On Calibration of Modern Neural Networks", ICML 2017 (ECE).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 15  # of Guo et al.


def log_mean(log_probabilities: Tensor) -> Tensor:
    """Return the logarithm of the members' averaged probabilities, exact also where they are tiny.

    Args:
        log_probabilities: (members, ...), each at most 0.

    Returns:
        (...), at most 0.
    """
    return torch.logsumexp(log_probabilities, dim=0) - math.log(len(log_probabilities))


def entropy(log_probabilities: Tensor) -> Tensor:
    """Return the entropy of distributions over classes, in nats.

    Args:
        log_probabilities: (..., classes).

    Returns:
        (...), in [0, log(classes)].
    """
    return torch.special.entr(log_probabilities.exp()).sum(dim=-1)


def mutual_information(log_probabilities: Tensor) -> Tensor:
    """Return what knowing the member would tell about the class, in nats: 0 where all members agree in every number.

    The entropy of the averaged prediction less the mean entropy of the members' own.

    Args:
        log_probabilities: (members, ..., classes).

    Returns:
        (...), in [0, log(min(members, classes))].
    """
    own = entropy(log_probabilities).mean(dim=0)
    return (entropy(log_mean(log_probabilities)) - own).clamp_min(0)  # rounding may leave it just below


def dissent(answers: Tensor) -> Tensor:
    """Return the share of members that differ from the vote, the answer that most of them give.

    Args:
        answers: Classes, integers, (members, ...).

    Returns:
        (...), float, 0 where all agree and at most 1 - 1 / members.
    """
    vote = answers.mode(dim=0).values
    return (answers != vote).float().mean(dim=0)


class Calibration:
    """The expected calibration error over any number of batches.

    Confidences in (0, 1] fall into 15 bins of equal width, (0, 1/15], (1/15, 2/15] and so on; the error is the mean
    over the predictions of the difference, bin by bin, between mean confidence and share of right answers.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(BINS, dtype=torch.float64)
        self._confidences = torch.zeros(BINS, dtype=torch.float64)
        self._right = torch.zeros(BINS, dtype=torch.float64)

    def add(self, confidences: Tensor, right: Tensor) -> None:
        """Count predictions.

        Args:
            confidences: Probabilities of the predicted classes, (predictions,), in [0, 1].
            right: Whether each is right, bool, (predictions,).
        """
        values = confidences.detach().to("cpu", torch.float64)
        bins = (torch.ceil(values * BINS) - 1).clamp(0, BINS - 1).long()
        self._counts += torch.bincount(bins, minlength=BINS)
        self._confidences += torch.bincount(bins, weights=values, minlength=BINS)
        self._right += torch.bincount(bins, weights=right.to("cpu", torch.float64), minlength=BINS)

    def error(self) -> float:
        """Return the expected calibration error, in [0, 1]; nan without predictions."""
        total = float(self._counts.sum())
        return float((self._confidences - self._right).abs().sum()) / total if total else math.nan


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """Return the chance that a positive has a higher score than a negative, ties counting one half.

    Args:
        scores: Any numbers, (values,).
        positive: bool, (values,).

    Returns:
        The area under the receiver operating characteristic, in [0, 1]; None without positives or without negatives.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    _, places, counts = scores.unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[places]  # from 1; equal scores share their mean rank
    return (float(ranks[positive].sum()) - positives * (positives + 1) / 2) / (positives * negatives)
