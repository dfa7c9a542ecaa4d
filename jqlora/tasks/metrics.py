"""Scores of predicted labels, by scikit-learn and scipy.

Each is a function of the true labels and the predicted ones, both [n], and returns a number. Where
a correlation is undefined, because all predictions are equal, it is 0: they tell nothing.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from jqlora.errors import ConfigError

Metric = Callable[[np.ndarray, np.ndarray], float]


def library(name: str) -> Any:
    """A module of the extra ``eval``; ConfigError saying how to install it where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"scores of tasks need {name.split('.')[0]}: pip install 'jqlora[eval]'"
        ) from error


def accuracy(true: np.ndarray, predicted: np.ndarray) -> float:
    """The share that is right."""
    return float(library("sklearn.metrics").accuracy_score(true, predicted))


def f1(true: np.ndarray, predicted: np.ndarray) -> float:
    """F1 of the class 1."""
    return float(library("sklearn.metrics").f1_score(true, predicted, zero_division=0))


def macro_f1(true: np.ndarray, predicted: np.ndarray) -> float:
    """The mean over the classes of their F1."""
    score = library("sklearn.metrics").f1_score
    return float(score(true, predicted, average="macro", zero_division=0))


def matthews_correlation(true: np.ndarray, predicted: np.ndarray) -> float:
    """Matthews' correlation coefficient, also of several classes."""
    return float(library("sklearn.metrics").matthews_corrcoef(true, predicted))


def pearson(true: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson's correlation."""
    return _correlation("pearsonr", true, predicted)


def spearman(true: np.ndarray, predicted: np.ndarray) -> float:
    """Spearman's correlation of ranks."""
    return _correlation("spearmanr", true, predicted)


def _correlation(name: str, true: np.ndarray, predicted: np.ndarray) -> float:
    if np.ptp(true) == 0 or np.ptp(predicted) == 0:
        return 0.0
    return float(getattr(library("scipy.stats"), name)(true, predicted)[0])


METRICS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (accuracy, f1, macro_f1, matthews_correlation, pearson, spearman)
}
