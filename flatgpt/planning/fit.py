"""A scaling law of one's own: L(N, D) = E + A / N^alpha + B / D^beta, fitted to what runs have ended with.

As in Chinchilla's approach 3 (arXiv:2203.15556) the constants are those with the least Huber loss of log L, found by
L-BFGS from a grid of starts. Huber's threshold is Chinchilla's 1e-3 at first; where runs scatter more than that, it is
then 1.345 times their scatter, which wastes little of what they tell and still lets no run that went wrong decide.

Intervals are from the Jacobian at the fit and from the residuals, with Student's t for as many degrees of freedom as
there are runs beyond the constants: six runs for five constants are told to say little. The interval of a loss is of
one run, its own scatter included. All intervals hold if the law does: nothing here sees a bend beyond the runs.

    points, varies = choose([Point("out/a", 200_000, 1_000_000, 2.1), ...])
    fit = fit_law(points, varies)
    fit.law, fit.interval("beta"), fit.predict(800_000, 4_000_000)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np

from flatgpt.planning.laws import Law

LEVEL = 0.9  # of all intervals
DELTA = 1e-3  # Huber's threshold on log L, Chinchilla's
EFFICIENT = 1.345  # Huber's threshold in deviations that loses 5% where the scatter is normal
EXPONENTS = (0.1, 0.2, 0.35, 0.5, 0.8, 1.2)  # the grid of starts
NUM_STARTS = 3  # of the grid that are followed
LEAST = -7.0  # log of the least that a term may be: a nat a thousandth of which no run tells
ALIKE = 1.05  # numbers of parameters, or of tokens, within this factor count as one
CONSTANTS = {"params": ("A", "alpha"), "tokens": ("B", "beta")}  # of a law that depends on that number

WORDS = {"params": "parameters", "tokens": "tokens"}


class Point(NamedTuple):
    name: str  # of the run
    num_params: int
    num_tokens: int
    loss: float  # in nats a token


@dataclass
class Fit:
    """A law and what is known of it. Inside, coefficients are those at the mean of log N and log D, where they are
    nearly independent of the exponents."""

    points: list[Point]
    varies: tuple[str, ...]  # of "params" and "tokens": what the law depends on
    law: Law  # A or B is 0 where it does not depend on that
    residuals: np.ndarray  # (points,): log of the run's loss less that of the law's
    noise: float  # deviation of a run from the law, in log L
    center: np.ndarray  # (varies,): mean log N, log D
    theta: np.ndarray  # log E, log of the coefficients at the center, exponents
    covariance: np.ndarray  # of E, log of the coefficients at the center, exponents
    quantile: float  # Student's

    def interval(self, constant: str) -> tuple[float, float]:
        """Where a constant of the law lies: not below 0, and E not above the lowest loss."""
        k = len(self.varies)
        names = ["E", *(CONSTANTS[name][0] for name in self.varies), *(CONSTANTS[name][1] for name in self.varies)]
        place, value = names.index(constant), getattr(self.law, constant)
        direction = np.eye(len(names))[place]
        if 1 <= place <= k:  # a coefficient: log A is that at the center and alpha times the center
            direction[place + k] = self.center[place - 1]
            spread = self.quantile * self._deviation(direction)
            return tuple((value * np.exp(np.clip([-spread, spread], -300, 300))).tolist())
        spread = self.quantile * self._deviation(direction)
        highest = min(point.loss for point in self.points) if constant == "E" else np.inf
        return max(0.0, value - spread), float(max(value, min(highest, value + spread)))

    def predict(self, num_params: float, num_tokens: float) -> tuple[float, float, float]:
        """The loss of a run, and the interval that it lies in. Raises ValueError where the law is of another size, or
        of another length, alone."""
        numbers = {"params": num_params, "tokens": num_tokens}
        for name in CONSTANTS.keys() - set(self.varies):
            ours = [getattr(point, f"num_{name}") for point in self.points]
            if not min(ours) / ALIKE <= numbers[name] <= max(ours) * ALIKE:
                words = WORDS[name]
                raise ValueError(f"these runs tell a law for {ours[0]:,} {words} alone: it says nothing of "
                                 f"{numbers[name]:,.0f}; add runs of other numbers of {words}")
        logs = np.log([[numbers[name]] for name in self.varies]) - self.center[:, None]
        value = _log_loss(self.theta, logs)[0]
        spread = self.quantile * np.hypot(self._deviation(_slopes(self.theta, logs)[0]), self.noise)
        return tuple(np.exp([value, *np.clip([value - spread, value + spread], -300, 300)]).tolist())

    def _deviation(self, direction: np.ndarray) -> float:
        return float(np.sqrt(max(0.0, direction @ self.covariance @ direction)))


def choose(points: Sequence[Point], left_out: dict[str, str]) -> tuple[list[Point], tuple[str, ...]]:
    """The points that a law can be fitted to, and what it depends on: parameters and tokens if there are enough of
    both; else tokens alone, of the runs of one size, or parameters alone, of the runs of one length; the other runs
    go to those `left_out`. Raises ValueError that says what is missing."""
    numbers = {name: _grouped([getattr(point, f"num_{name}") for point in points]) for name in CONSTANTS}
    distinct = {name: len(set(groups)) for name, groups in numbers.items()}
    if len(points) >= 6 and min(distinct.values()) >= 3:
        return list(points), ("params", "tokens")
    candidates = []
    for name, other in (("tokens", "params"), ("params", "tokens")):
        for group in set(numbers[other]):
            members = [i for i, its in enumerate(numbers[other]) if its == group]
            if len(members) >= 4 and len({numbers[name][i] for i in members}) >= 3:
                candidates.append(([points[i] for i in members], (name,)))
    if not candidates:
        why = f"; left out: {'; '.join(f'{name}: {reason}' for name, reason in [*left_out.items()][:3])}"
        raise ValueError(
            f"{len(points)} finished runs of {distinct['params']} sizes and {distinct['tokens']} lengths do not "
            "determine a law: one over parameters and tokens takes 6 runs, with 3 sizes and 3 lengths among them; one "
            "over tokens alone, 4 runs of one size, with 3 lengths; one over parameters alone, 4 runs of one length, "
            f"with 3 sizes{why if left_out else ''}" + (f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""))
    chosen, varies = max(candidates, key=lambda candidate: len(candidate[0]))
    left_out |= {point.name: f"the law is over {WORDS[varies[0]]} alone, of the runs that agree in the other number"
                 for point in points if point not in chosen}
    return chosen, varies


def _grouped(values: Sequence[int]) -> list[int]:
    """For each value the number of its group; values are of one where no gap of more than ALIKE lies between them."""
    ordered = sorted(values)
    starts = [value for before, value in pairwise(ordered) if value > ALIKE * before]
    return [sum(value >= start for start in starts) for value in values]


def fit_law(points: Sequence[Point], varies: tuple[str, ...]) -> Fit:
    """The law of these points, which `choose` has found to be enough."""
    logs = np.log([[getattr(point, f"num_{name}") for point in points] for name in varies])  # (varies, points)
    center, log_losses = logs.mean(1), np.log([point.loss for point in points])
    logs = logs - center[:, None]
    freedom = len(points) - 1 - 2 * len(varies)
    theta = min((_descend(start, logs, log_losses, DELTA) for start in _starts(logs, log_losses)),
                key=lambda theta: _huber(theta, logs, log_losses, DELTA)[0])
    # A fit by absolute differences passes through as many points as it has constants; the other points tell.
    apart = np.sort(abs(log_losses - _log_loss(theta, logs)))[-freedom:]
    delta = max(DELTA, EFFICIENT * float(np.median(apart)) / 0.6745)
    theta = _descend(theta, logs, log_losses, delta)
    residuals = log_losses - _log_loss(theta, logs)
    noise = _noise(residuals, delta, len(theta))
    slopes = _slopes(theta, logs)
    scale = np.sqrt((slopes**2).sum(0))
    inverse = np.linalg.inv(slopes.T @ slopes / np.outer(scale, scale) + 1e-12 * np.eye(len(theta)))
    from scipy.stats import t as student

    constants = {"E": np.exp(theta[0]), "A": 0.0, "B": 0.0, "alpha": 0.0, "beta": 0.0}
    for name, middle, coefficient, exponent in zip(varies, center, theta[1:], theta[1 + len(varies):]):
        constants |= dict(zip(CONSTANTS[name], (np.exp(coefficient + exponent * middle), exponent)))
    return Fit(list(points), varies, Law(**{key: float(value) for key, value in constants.items()}), residuals,
               noise, center, theta, noise**2 * inverse / np.outer(scale, scale),
               float(student.ppf((1 + LEVEL) / 2, freedom)))


def _noise(residuals: np.ndarray, delta: float, num_constants: int) -> float:
    """The deviation of a run: Huber's estimate, with his correction for few points (Robust Statistics, 1981, chapter
    7.6)."""
    share = np.mean(abs(residuals) <= delta)
    squares = (np.clip(residuals, -delta, delta) ** 2).sum() / (len(residuals) - num_constants)
    return float(np.sqrt(squares) / share * (1 + num_constants / len(residuals) * (1 - share) / share))


# theta: log E, then a log coefficient for each number that the law depends on, then an exponent for each; logs are the
# numbers' logarithms (varies, points) less their center


def _terms(theta: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """(1 + varies, points): the logs of the law's terms."""
    coefficients, exponents = np.split(theta[1:, None], 2)
    return np.concatenate([np.full((1, logs.shape[1]), theta[0]), coefficients - exponents * logs])


def _log_loss(theta: np.ndarray, logs: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(_terms(theta, logs))


def _gradient(theta: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """(points, theta): what log L changes by with each of theta."""
    terms = _terms(theta, logs)
    shares = np.exp(terms - np.logaddexp.reduce(terms))
    return np.concatenate([shares, -shares[1:] * logs]).T


def _slopes(theta: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """The same, with E in the place of log E, whose interval may reach down to 0."""
    slopes = _gradient(theta, logs)
    slopes[:, 0] /= np.exp(theta[0])
    return slopes


def _huber(theta: np.ndarray, logs: np.ndarray, log_losses: np.ndarray, delta: float) -> tuple[float, np.ndarray]:
    """Huber's loss, in units of delta, and its gradient."""
    residuals = _log_loss(theta, logs) - log_losses
    clipped = np.clip(residuals, -delta, delta)
    return float((clipped * (residuals - clipped / 2)).sum()) / delta, clipped @ _gradient(theta, logs) / delta


def _starts(logs: np.ndarray, log_losses: np.ndarray) -> Iterator[np.ndarray]:
    """The best points of a grid of exponents, each with the E, A and B that have the least squares there."""
    from scipy.optimize import nnls

    losses, found = np.exp(log_losses), []
    for exponents in product(EXPONENTS, repeat=len(logs)):
        columns = np.concatenate([np.ones((1, len(losses))), np.exp(-np.array(exponents)[:, None] * logs)])
        coefficients, error = nnls((columns / losses).T, np.ones(len(losses)))
        found.append((error, [*np.log(np.maximum(coefficients, np.exp(LEAST))), *exponents]))
    yield from (np.array(start) for _, start in sorted(found)[:NUM_STARTS])


def _descend(start: np.ndarray, logs: np.ndarray, log_losses: np.ndarray, delta: float) -> np.ndarray:
    from scipy.optimize import minimize

    bounds = [(LEAST, 7.0)] * (1 + len(logs)) + [(0.01, 3.0)] * len(logs)
    return minimize(_huber, start, (logs, log_losses, delta), "L-BFGS-B", jac=True, bounds=bounds,
                    options={"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-8}).x
