import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.models.sampling import Sampling, sample

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2]))
DRAWS = 4000


def _frequencies(sampling):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    logits = jnp.tile(jnp.asarray(LOGITS, jnp.float32)[None], (DRAWS, 1))
    drawn = jax.jit(lambda logits, keys: sample(logits, keys, sampling))(logits, keys)
    chex.assert_type(drawn, jnp.int32)
    return np.bincount(np.asarray(drawn), minlength=5) / DRAWS


def _expected(sampling):
    """Returns the probabilities from the definition, in float64."""
    p = np.exp(LOGITS / sampling.temperature)
    order = np.argsort(-p)
    order = order[: sampling.top_k or 5]
    p = p[order] / p[order].sum()
    kept = 1 + int((np.cumsum(p) < sampling.top_p - 1e-9).sum())
    found = np.zeros(5)
    found[order[:kept]] = p[:kept] / p[:kept].sum()
    return found


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(temperature=0.5),
        dict(top_k=2),
        dict(top_k=9),
        dict(top_p=0.7),
        dict(top_p=0.01),
        dict(temperature=2.0, top_k=4, top_p=0.6),
    ],
)
def test_draws_have_the_distribution_of_the_definition(fields):
    sampling = Sampling(**fields)
    expected = _expected(sampling)
    found = _frequencies(sampling)
    assert (found[expected == 0] == 0).all()
    # Five standard deviations of a share of 4,000 draws.
    chex.assert_trees_all_close(found, expected, rtol=1e-7, atol=5 * 0.5 / DRAWS**0.5)


def test_a_nucleus_of_most_tokens_is_drawn_from_and_disturbs_no_other_sequence():
    # Of 4,000 tokens 0.6 takes more than are sought first in the first row, and few in the second.
    rng = np.random.default_rng(0)
    flat, peaked = 0.3 * rng.normal(size=4000), 0.3 * rng.normal(size=4000)
    peaked[:5] += 9
    draw = jax.jit(lambda logits, keys: sample(logits, keys, Sampling(top_p=0.6)))
    keys = jax.random.split(jax.random.key(2), (300, 2))
    both = jnp.asarray(np.stack([flat, peaked]), jnp.float32)
    drawn = np.stack([draw(both, pair) for pair in keys])
    for row, logits in enumerate((flat, peaked)):
        p = np.exp(logits) / np.exp(logits).sum()
        order = np.argsort(-p)
        kept = order[: 1 + int((np.cumsum(p[order]) < 0.6).sum())]
        assert len(kept) > 1024 if row == 0 else 1 < len(kept) < 5
        assert set(drawn[:, row].tolist()) <= set(kept.tolist())
        ranks = np.argsort(order)[drawn[:, row]]
        # The mean rank of the definition, within five standard deviations of a mean of 300.
        share, rank = p[kept] / p[kept].sum(), np.arange(len(kept))
        mean = (share * rank).sum()
        spread = np.sqrt((share * (rank - mean) ** 2).sum())
        assert abs(ranks.mean() - mean) < 5 * spread / 300**0.5
    alone = np.stack([draw(both[1:], pair[1:]) for pair in keys[:50]])
    chex.assert_trees_all_equal(alone[:, 0], drawn[:50, 1])


def test_temperature_zero_is_the_likeliest_token_and_needs_no_luck():
    assert _frequencies(Sampling(temperature=0, top_k=3, top_p=0.1)).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("fields", [dict(), dict(top_k=3), dict(top_p=0.9)])
@pytest.mark.parametrize("temperature", [1e-38, 1e-300])
def test_a_temperature_close_to_zero_takes_the_likeliest_too(temperature, fields):
    assert _frequencies(Sampling(temperature=temperature, **fields)).tolist() == [0, 1, 0, 0, 0]
