"""The loss to expect of a model of a size after so many tokens, by the scaling laws that others published.

Owns the laws and what each was fitted on. fit.py fits a law of the same form to runs of one's own. No law here knows
the text, the tokenizer or the recipe of a run: a loss in nats a token depends on all three.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

Numbers = TypeVar("Numbers")  # a float, or an array of NumPy


class Law(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta: the loss in nats a token, of N parameters and D tokens."""

    E: float  # what no model goes below
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, num_params: Numbers, num_tokens: Numbers) -> Numbers:
        """Of numbers above 0, or of arrays of them."""
        return self.E + self.A / num_params**self.alpha + self.B / num_tokens**self.beta


class Range(NamedTuple):
    """What the runs behind a law reached from and to."""

    params: tuple[float, float]
    tokens: tuple[float, float]


CHINCHILLA = Law(1.69, 406.4, 410.7, 0.34, 0.28)  # arXiv:2203.15556, approach 3, equation 10
REPLICATION = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # arXiv:2404.10102, from the points in a figure of that
CHINCHILLA_RANGE = Range((70e6, 16e9), (5e9, 500e9))
KAPLAN_RANGE = Range((768, 1.5e9), (22e6, 23e9))


def kaplan_loss(num_non_embedding: float, num_tokens: float) -> float:
    """arXiv:2001.08361, equation 1.5 with the constants of table 2: nats a token, where N leaves out the tables of
    tokens and positions, and D is the size of the data set, from which a run may take several epochs."""
    alpha_n, alpha_d, n_c, d_c = 0.076, 0.103, 6.4e13, 1.8e13
    return ((n_c / num_non_embedding) ** (alpha_n / alpha_d) + d_c / num_tokens) ** alpha_d


def expected_losses(num_params: int, num_non_embedding: int, num_tokens: float) -> list[tuple[str, float, str]]:
    """For each published law its name and source, the loss in nats a token, and its limits in a sentence.

    `num_params` is all of a model's parameters, a tied table once; `num_non_embedding` leaves out the tables of tokens
    and positions, and a model that has nothing else gets no loss of Kaplan's law. Raises ValueError for numbers that
    are not above 0."""
    if num_params <= 0 or num_tokens <= 0:
        raise ValueError(f"no law tells a loss for {num_params:,} parameters and {num_tokens:,} tokens: both must be "
                         "above 0")
    english = "mostly English web text and books (MassiveText), a SentencePiece vocabulary of 32,000, one epoch"
    found = [
        ("Chinchilla (Hoffmann et al. 2022, arXiv:2203.15556, approach 3)", CHINCHILLA.loss(num_params, num_tokens),
         f"All parameters count; {english}; {_limits(CHINCHILLA_RANGE, num_params, num_tokens)}"),
        ("Chinchilla's points fitted anew (Besiroglu et al. 2024, arXiv:2404.10102)",
         REPLICATION.loss(num_params, num_tokens),
         f"Chinchilla's runs as read off a figure: {_limits(CHINCHILLA_RANGE, num_params, num_tokens)}")]
    if num_non_embedding > 0:
        found.append((
            "Kaplan (Kaplan et al. 2020, arXiv:2001.08361, L(N, D))", kaplan_loss(num_non_embedding, num_tokens),
            "Parameters without the tables count, and tokens of the data set, read until the loss stops falling; "
            f"English web pages (WebText2), GPT-2's vocabulary of 50,257; "
            f"{_limits(KAPLAN_RANGE, num_non_embedding, num_tokens)}"))
    return found


def _limits(fitted: Range, num_params: float, num_tokens: float) -> str:
    """The end of a sentence: the range, and which of the two numbers lies outside."""
    outside = [name for name, value, (low, high) in (("parameters", num_params, fitted.params),
                                                     ("tokens", num_tokens, fitted.tokens)) if not low <= value <= high]
    reach = (f"fitted on {_short(fitted.params[0])} to {_short(fitted.params[1])} parameters and "
             f"{_short(fitted.tokens[0])} to {_short(fitted.tokens[1])} tokens")
    return reach + (f", so that this run's {' and '.join(outside)} are beyond it." if outside else ".")


def _short(value: float) -> str:
    """16e9 -> 16B."""
    power, letter = next(((p, s) for p, s in ((9, "B"), (6, "M")) if value >= 10**p), (0, ""))
    return f"{value / 10**power:g}{letter}"
