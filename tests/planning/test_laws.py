"""laws.py: the published laws say what their papers say of models that everyone knows."""

import numpy as np
import pytest

from flatgpt.planning.laws import CHINCHILLA, REPLICATION, Law, expected_losses, kaplan_loss

CHINCHILLA_FLOPS = 6 * 70e9 * 1.4e12


def losses(num_params: float, num_tokens: float, num_non_embedding: float | None = None) -> list[float]:
    return [loss for _, loss, _ in expected_losses(num_params, num_non_embedding or num_params, num_tokens)]


def compute_optimal(law: Law, flops: float) -> tuple[float, float]:
    """The N and D of a budget 6 N D with the lowest loss, by search."""
    sizes = np.geomspace(1e9, 1e12, 20001)
    best = sizes[np.argmin(law.loss(sizes, flops / 6 / sizes))]
    return best, flops / 6 / best


def test_chinchilla_is_better_than_gopher_by_the_difference_of_the_papers_terms():
    # 70B on 1.4T and 280B on 300B, the two models of the paper, with each term worked out by hand.
    assert losses(70e9, 1.4e12)[0] == pytest.approx(1.69 + 0.0835 + 0.1632, abs=2e-3)
    assert losses(280e9, 300e9)[0] == pytest.approx(1.69 + 0.0521 + 0.2511, abs=2e-3)


def test_the_replication_finds_about_20_tokens_a_parameter_best_at_chinchillas_compute():
    num_params, num_tokens = compute_optimal(REPLICATION, CHINCHILLA_FLOPS)
    assert 17 < num_tokens / num_params < 22  # what the replication says of itself, and Chinchilla was given 20
    assert 60e9 < num_params < 80e9


def test_chinchillas_best_size_grows_with_compute_as_its_table_says():
    small, large = (compute_optimal(CHINCHILLA, flops)[0] for flops in (1e22, 1e24))
    assert np.log(large / small) / np.log(100) == pytest.approx(0.46, abs=0.01)  # table 2, approach 3


def test_kaplans_law_meets_its_limits_in_one_number():
    # Without a limit of data it is (N_c / N)^alpha_N, without one of size (D_c / D)^alpha_D.
    assert kaplan_loss(1.5e9, 1e30) == pytest.approx((6.4e13 / 1.5e9) ** 0.076)
    assert kaplan_loss(1e30, 22e9) == pytest.approx((1.8e13 / 22e9) ** 0.103)
    assert 2.2 < kaplan_loss(1.5e9, 23e9) < 2.5  # the lower right corner of the paper's figure 4


def test_every_law_falls_with_parameters_and_with_tokens():
    for smaller, larger in ((losses(1e8, 1e10), losses(1e9, 1e10)), (losses(1e8, 1e10), losses(1e8, 1e11))):
        assert all(after < before for before, after in zip(smaller, larger))


def test_the_laws_are_named_with_their_source_and_say_when_a_run_lies_beyond_them():
    inside, beyond = expected_losses(124_000_000, 85_000_000, 10e9), expected_losses(800_000, 790_000, 1e6)
    assert [name.split()[0] for name, _, _ in inside] == ["Chinchilla", "Chinchilla's", "Kaplan"]
    assert all("arXiv:" in name and limits.endswith(".") for name, _, limits in inside)
    assert not any("beyond" in limits for _, _, limits in inside)
    assert ["this run's parameters and tokens are beyond" in limits for _, _, limits in beyond] == [True, True, False]
    assert "this run's tokens are beyond" in beyond[2][2]  # Kaplan's smallest model has 768 parameters


def test_what_no_law_is_for_is_refused_or_left_out():
    assert len(expected_losses(4096, 0, 1e6)) == 2  # a table alone: a bigram
    for numbers in ((0, 0, 1e6), (1000, 1000, 0.0)):
        with pytest.raises(ValueError, match="must be above 0"):
            expected_losses(*numbers)
