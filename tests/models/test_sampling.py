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
    assert drawn.dtype == jnp.int32
    return np.bincount(np.asarray(drawn), minlength=5) / DRAWS


def _expected(sampling):
    """From the definition, in float64."""
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
    np.testing.assert_allclose(found, expected, atol=5 * 0.5 / DRAWS**0.5)


def test_temperature_zero_is_the_likeliest_token_and_needs_no_luck():
    assert _frequencies(Sampling(temperature=0, top_k=3, top_p=0.1)).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("fields", [dict(), dict(top_k=3), dict(top_p=0.9)])
@pytest.mark.parametrize("temperature", [1e-38, 1e-300])
def test_a_temperature_close_to_zero_takes_the_likeliest_too(temperature, fields):
    assert _frequencies(Sampling(temperature=temperature, **fields)).tolist() == [0, 1, 0, 0, 0]
