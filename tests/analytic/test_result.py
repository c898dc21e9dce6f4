import jax
import numpy as np
import pytest

from gadjax.analytic import Bench, Gaussian, Mixture, table
from gadjax.analytic.result import compare_maps, sliced_wasserstein

# Its ODE from pure noise is the identity.
PLAIN = Bench(Gaussian(np.zeros(2), np.eye(2), np.ones(2)))
TURN = np.array([[0, -1], [1, 0]], np.float32)


@pytest.mark.parametrize(
    "matrix,cost,error,cosine,w2",
    [(np.eye(2), 0, 0, 1, 0), (1.5 * np.eye(2), 0.25, 0.5, 1, 0.5), (TURN, 2, 2**0.5, 0, 0)],
    ids=["identity", "too wide", "turned"],
)
def test_linear_maps_compared_with_the_identity(matrix, cost, error, cosine, w2):
    result = PLAIN.measure(lambda _, z: z @ matrix.T)
    assert result.transport_cost == pytest.approx(cost, abs=1e-6, rel=0.1)  # drawn noises
    assert result.jacobian_error == pytest.approx(error, abs=1e-6)
    assert result.jacobian_cosine == pytest.approx(cosine, abs=1e-6)
    assert result.modes_covered == 1
    assert result.mode_spread == pytest.approx(1.5 if w2 else 1, rel=0.05)
    assert result.sliced_wasserstein == pytest.approx(w2, abs=0.06)  # 4096 samples of either
    np.testing.assert_allclose(result.samples, result.noise @ matrix.T, rtol=1e-6)


def test_the_map_of_a_mixture_is_perfect_and_that_of_one_mode_is_not():
    bench = Bench(Mixture.ring())
    end, jacobian = bench.reference[2:]
    few = bench.reference._replace(sample=bench.reference.sample[: len(end)])
    right = compare_maps(bench.teacher, few, end, jacobian)
    assert right.sliced_wasserstein < 0.1 and right.mode_spread == pytest.approx(1, rel=0.05)
    assert right.modes_covered == 1 and right.transport_cost == 0 == right.jacobian_error
    assert right.jacobian_cosine == pytest.approx(1)
    stuck = np.broadcast_to(bench.teacher.means[0], end.shape)
    wrong = compare_maps(bench.teacher, few, stuck, 0 * jacobian)
    assert wrong.modes_covered == 1 / 8 and wrong.mode_spread == 0 and wrong.jacobian_error == 1
    assert wrong.jacobian_cosine == 0 and wrong.transport_cost > 1


def test_a_mode_is_covered_by_half_of_its_share():
    teacher = Mixture(np.array([[-2.0], [2.0]]), np.full(2, 0.1), np.array([0.8, 0.2]))
    bench = Bench(teacher)
    few = bench.reference._replace(end=bench.reference.end[:10])
    empty = np.zeros_like(few.jacobian)

    def covered(share, where=2.0):
        right = np.arange(4096) < share * 4096
        samples = np.where(right, where, -2.0)[:, None]
        return compare_maps(teacher, few, samples, empty).modes_covered

    assert [covered(0.09), covered(0.11), covered(0.59), covered(0.61)] == [0.5, 1, 1, 0.5]
    # 3 standard deviations of |x|^2 away is 1 + 3 sqrt(2) = 2.29^2.
    assert [covered(0.2, 2 + far * 0.1**0.5) for far in (2.2, 2.4)] == [1, 0.5]


def test_sliced_wasserstein_of_a_shift_and_of_an_order():
    x = np.asarray(jax.random.normal(jax.random.key(0), (500, 3)), float)
    assert sliced_wasserstein(x, x[::-1]) == 0
    assert sliced_wasserstein(x[:, :1], x[:, :1] + 0.7) == pytest.approx(0.7)
    # |shift| / sqrt(D) for infinitely many directions.
    assert sliced_wasserstein(x, x + [0, 0.9, 0]) == pytest.approx(0.9 / 3**0.5, rel=0.1)


def test_a_table_has_means_and_ranges():
    results = [PLAIN.measure(lambda _, z, a=a: a * z) for a in (1.0, 1.5)]
    lines = table({"one": results[:1], "two": results}).splitlines()
    assert [line.count("|") for line in lines] == [8] * 4
    assert lines[2].startswith("| one | 1.000 | ") and "(" not in lines[2]
    assert "| 0.250 (0.000 to 0.500) |" in lines[3]
