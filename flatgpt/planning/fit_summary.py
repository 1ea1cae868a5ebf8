"""A law that was fitted to runs, as one dictionary of plain values, which plan.py prints as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flatgpt.planning.fit import CONSTANTS, LEVEL, Fit

TERMS = {"params": "A / N^alpha", "tokens": "B / D^beta"}
FARTHER = 10  # times the compute of the largest run: how far a law is extrapolated where nothing else is asked for


def target(fit: Fit, num_params: float = 0, num_tokens: float = 0) -> tuple[float, float]:
    """Parameters and tokens of the run to extrapolate to. Where one number is not given (0), it is that of the run with
    the most compute; where neither is, both grow, in proportion, as far as the law depends on them."""
    largest = max(fit.points, key=lambda point: point.num_params * point.num_tokens)
    if num_params or num_tokens:
        return num_params or largest.num_params, num_tokens or largest.num_tokens
    factor = FARTHER ** (1 / len(fit.varies))
    return (largest.num_params * (factor if "params" in fit.varies else 1),
            largest.num_tokens * (factor if "tokens" in fit.varies else 1))


def summarize_fit(fit: Fit, to: tuple[float, float], left_out: Mapping[str, str],
                  differences: Mapping[str, list[str]]) -> dict[str, Any]:
    """The law, its intervals, the runs, and what it says of a run of `to` = (parameters, tokens)."""
    loss, low, high = fit.predict(*to)
    names = ["E", *(constant for name in fit.varies for constant in CONSTANTS[name])]
    constants = {name: dict(zip(("value", "low", "high"), (getattr(fit.law, name), *fit.interval(name))))
                 for name in names}
    runs = [{"run": point.name, "parameters": point.num_params, "tokens": point.num_tokens, "loss": point.loss,
             "law": fit.law.loss(point.num_params, point.num_tokens), "residual": float(residual)}
            for point, residual in zip(fit.points, fit.residuals)]
    most = max(point.num_params * point.num_tokens for point in fit.points)
    return {"law": " + ".join(["E", *(TERMS[name] for name in fit.varies)]), "level": LEVEL, "constants": constants,
            "noise": fit.noise, "noise_of_seeds": _noise_of_seeds(fit), "runs": runs, "left_out": dict(left_out),
            "differences": dict(differences),
            "extrapolation": {"parameters": round(to[0]), "tokens": round(to[1]), "loss": loss, "low": low,
                              "high": high, "times_the_compute": to[0] * to[1] / most}}


def _noise_of_seeds(fit: Fit) -> float | None:
    """The deviation, in log L, of runs of one size and length from their mean; None where there are no two."""
    groups: dict[tuple[int, int], list[float]] = {}
    for point in fit.points:
        groups.setdefault((point.num_params, point.num_tokens), []).append(float(np.log(point.loss)))
    apart = [loss - float(np.mean(losses)) for losses in groups.values() for loss in losses]
    freedom = len(fit.points) - len(groups)
    return float(np.linalg.norm(apart)) / freedom**0.5 if freedom else None


def fit_as_text(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines that a person reads."""
    constants, runs, to = found["constants"], found["runs"], found["extrapolation"]
    yield (f"L = {found['law']}, in nats a token, of N parameters and D tokens; fitted to {len(runs)} runs, intervals "
           f"of {found['level']:.0%}")
    for name, its in constants.items():
        yield f"    {name:<6}{its['value']:>10.4g}   {its['low']:.4g} to {its['high']:.4g}"
    seeds = found["noise_of_seeds"]
    yield (f"a run is {found['noise']:.2%} off the law"
           + ("" if seeds is None else f"; runs of one size and length are {seeds:.2%} apart, which no law explains"))
    width = max(len("run"), *(len(run["run"]) for run in runs))
    yield f"    {'run':<{width}}{'parameters':>16}{'tokens':>18}{'loss':>9}{'law':>9}{'off':>8}"
    for run in sorted(runs, key=lambda run: (run["parameters"], run["tokens"])):
        yield (f"    {run['run']:<{width}}{run['parameters']:>16,}{run['tokens']:>18,}{run['loss']:>9.4f}"
               f"{run['law']:>9.4f}{run['residual']:>8.2%}")
    for name, reason in found["left_out"].items():
        yield f"left out: {name}: {reason}"
    for option, values in found["differences"].items():
        yield f"warning: the runs differ in {option} ({', '.join(values)}), and the law takes them for one recipe"
    if seeds and found["noise"] > 2 * seeds:
        yield ("warning: the law misses the runs by more than seeds explain, so that they are not quite of its form: "
               "intervals say too little about a run far from these")
    for name in ("alpha", "beta"):
        if name in constants and constants[name]["low"] == 0:
            yield (f"warning: the interval of {name} reaches 0: these runs hardly tell how the loss falls with "
                   f"{'parameters' if name == 'alpha' else 'tokens'}")
    yield (f"extrapolated to {to['parameters']:,} parameters and {to['tokens']:,} tokens, "
           f"{to['times_the_compute']:.3g} times the most compute of a run: a loss of {to['loss']:.4g} "
           f"({to['low']:.4g} to {to['high']:.4g}) for one run, if the law holds there")
