"""The hash of n-grams against NumPy's int64, Python's integers and numbers of the released definition."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import ngram_constants, ngram_hash

# One Engram layer made by the published definition: seed 0, layer 1 of the layers (1, 3) with tables, 90
# canonical ids, orders 2 and 3 of 4 heads, wished sizes 97 and 151. Token 2 pads; its canonical id is 53.
MULTIPLIERS = [84373640682384813, 5328811131540259, 39592398327432931]
SIZES = (97, 101, 103, 107, 151, 157, 163, 167)
PAD = 53
IDS = [75, 17, 60, 75, 17, 58, 45, 16, 82, 79, 43]
ROWS = [
    [74, 69, 40, 25, 75, 143, 150, 143],
    [61, 43, 95, 93, 64, 144, 100, 86],
    [81, 99, 21, 52, 68, 11, 106, 57],
]


def _numpy_slots(ids, factors, sizes, orders, previous):
    """The definition in int64 NumPy, which wraps around, as in the released demo."""
    span = max(orders)
    window = np.concatenate([previous, ids], 1).astype(np.int64)
    shifted = [window[:, span - 1 - i : window.shape[1] - i] for i in range(span)]
    hashes = list(
        itertools.accumulate((x * a for x, a in zip(shifted, factors, strict=False)), np.bitwise_xor)
    )
    heads = len(sizes) // len(orders)
    return np.stack([hashes[orders[r // heads] - 1] % size for r, size in enumerate(sizes)], -1)


def _slots(ids, factors, sizes, orders, previous):
    fn = jax.jit(lambda i, p: ngram_hash.ngram_slots(i, factors, sizes, orders, pad_id=0, previous=p))
    slots = fn(jnp.asarray(ids, jnp.int32), jnp.asarray(previous, jnp.int32))
    chex.assert_type(slots, jnp.int32)
    chex.assert_shape(slots, (*ids.shape, len(sizes)))
    return np.asarray(slots)


def test_a_layer_of_the_published_definition():
    factors = ngram_constants.multipliers(seed=0, layer_id=1, num_canonical_ids=90, max_order=3)
    assert factors.tolist() == MULTIPLIERS
    chex.assert_type(factors, np.int64)
    sizes = ngram_constants.head_sizes([97, 151], num_heads=4, layers=2)
    assert sizes == (SIZES, (109, 113, 127, 131, 173, 179, 181, 191))
    slots = jax.jit(lambda ids: ngram_hash.ngram_slots(ids, factors, SIZES, (2, 3), pad_id=PAD))(
        jnp.array([IDS], jnp.int32)
    )
    assert slots[0, :3].tolist() == ROWS
    padding = np.full((1, 2), PAD)
    chex.assert_trees_all_equal(slots, _numpy_slots(np.array([IDS]), factors, SIZES, (2, 3), padding))


@pytest.mark.parametrize(
    "vocab, orders, heads, wished",
    [
        (2**24, (2, 3), 8, 2**31 - 400),
        (2**24, (2, 3, 4, 5), 16, 300_000_000),
        (129_280, (2, 3), 8, 646_400),
        (90, (2,), 1, 2),
        (2, (1, 3), 2, 2**16),
    ],
)
def test_rows_are_those_of_int64(vocab, orders, heads, wished):
    random = np.random.default_rng(vocab)
    span = max(orders)
    factors = ngram_constants.multipliers(5, 2, vocab, span)
    sizes = ngram_constants.head_sizes([wished] * len(orders), heads, 1)[0]
    assert len(set(sizes)) == len(orders) * heads
    ids, previous = random.integers(0, vocab, (3, 700)), random.integers(0, vocab, (3, span - 1))
    ids[0, :20] = vocab - 1  # the largest products
    expected = _numpy_slots(ids, factors, sizes, orders, previous)
    chex.assert_trees_all_equal(_slots(ids, factors, sizes, orders, previous), expected)
    # NumPy did not wrap around: integers without bounds give the same.
    t, n = 400, orders[-1]
    window = [int(x) for x in ids[1, t - n + 1 : t + 1]][::-1]
    exact = 0
    for x, factor in zip(window, factors.tolist(), strict=False):
        exact ^= x * factor
    assert 0 <= exact < 2**63 and exact % sizes[-1] == expected[1, t, -1]


def test_hashes_that_wrap_around_and_are_negative_give_rows_as_numpy_does():
    random = np.random.default_rng(0)
    factors = random.integers(-(2**63), 2**63, 3, np.int64)
    sizes = (13, 97, 2**20, 646_403, 2**31 - 19, 2**31 - 1)
    ids, previous = random.integers(0, 2**31, (2, 3000)), random.integers(0, 2**31, (2, 2))
    expected = _numpy_slots(ids, factors, sizes, (2, 3), previous)
    chex.assert_trees_all_equal(_slots(ids, factors, sizes, (2, 3), previous), expected)


def test_remainders_next_to_multiples_of_the_size():
    # Where an estimated quotient is off by one if ever: of 64-bit numbers k·p - 1, k·p and k·p + 1.
    random = np.random.default_rng(1)
    for p in (2, 3, 5, 13, 16, 17, 101, 65_537, 2**24 - 3, 646_403, 1_431_655_777, 2**31 - 1):
        largest = (2**63 - 2) // p
        k = [1, 2, largest, *random.integers(1, largest, 1000).tolist()]
        k += [min(largest, (1 << b) + d) for b in range(1, 63) for d in (-1, 0, 1)]
        numbers = np.array([q * p + d for q in k for d in (-1, 0, 1)], np.int64)
        words = ngram_hash._Word(
            jnp.asarray((numbers >> 32).astype(np.uint32))[:, None],
            jnp.asarray((numbers & 0xFFFFFFFF).astype(np.uint32))[:, None],
        )
        sizes = np.array([[p]])
        found = jax.jit(lambda x, sizes=sizes: ngram_hash._remainders(x, sizes))(words)
        chex.assert_trees_all_equal(found[:, 0, 0], numbers % p)


def test_a_chunk_with_the_ids_before_it_has_the_rows_of_the_whole():
    factors = ngram_constants.multipliers(0, 0, 1000, 4)
    sizes = ngram_constants.head_sizes([1000, 500, 2000], 2, 1)[0]
    ids = np.random.default_rng(2).integers(0, 1000, (2, 12)).astype(np.int32)
    slots = jax.jit(
        lambda chunk, previous=None: ngram_hash.ngram_slots(
            chunk, factors, sizes, (2, 3, 4), pad_id=7, previous=previous
        )
    )
    whole = slots(ids)
    extended = np.pad(ids, ((0, 0), (3, 0)), constant_values=7)
    chex.assert_trees_all_equal(slots(ids, extended[:, :3]), whole)
    for start in range(12):  # a token at a time, as in decoding
        one = slots(ids[:, start : start + 1], extended[:, start : start + 3])
        chex.assert_trees_all_equal(one, whole[:, start : start + 1])
    chex.assert_trees_all_equal(slots(ids[:, :5]), whole[:, :5])
    chex.assert_trees_all_equal(slots(ids[:, 5:], ids[:, 2:5]), whole[:, 5:])


def test_an_exact_table_is_read_at_the_id():
    assert ngram_hash.exact_slots(jnp.array([[3, 0, 89]], jnp.int32)).tolist() == [[[3], [0], [89]]]


def test_multipliers_are_odd_and_their_own_in_every_layer_and_seed():
    drawn = [ngram_constants.multipliers(seed, layer, 2**24, 5) for seed in (0, 1) for layer in (0, 7)]
    assert len(np.unique(drawn)) == 20
    assert all((a % 2 == 1).all() and int(a.max()) * (2**24 - 1) < 2**63 for a in drawn)


def test_sizes_are_primes_that_no_other_head_has():
    # Orders with equal, overlapping and separate ranges; every prime from the wished size on is used once.
    layers = ngram_constants.head_sizes([100, 100, 120, 1000], num_heads=3, layers=3)
    assert layers[0] == (101, 103, 107, 109, 113, 127, 131, 137, 139, 1009, 1013, 1019)
    assert layers[1] == (149, 151, 157, 163, 167, 173, 179, 181, 191, 1021, 1031, 1033)
    # After the release: each head searches from its order's wished size, past all that are taken.
    taken = set()
    for layer, (order, size) in itertools.product(range(3), enumerate([100, 100, 120, 1000])):
        for head in range(3):
            prime = next(p for p in itertools.count(size) if _has_no_divisor(p) and p not in taken)
            taken.add(prime)
            assert layers[layer][3 * order + head] == prime


def test_primes_by_trial_division():
    near = [*range(3000), *range(2**31 - 60, 2**31 + 20)]
    assert [n for n in near if ngram_constants.is_prime(n)] == [n for n in near if _has_no_divisor(n)]
    # Strong pseudoprimes to bases 2; 2 and 3; 2, 3 and 5.
    assert not any(map(ngram_constants.is_prime, (2047, 1_373_653, 25_326_001)))


def test_sizes_end_with_the_largest_prime_of_31_bits():
    assert ngram_constants.head_sizes([2**31 - 19], 2, 1) == ((2**31 - 19, 2**31 - 1),)
    with pytest.raises(ValueError, match="too few primes"):
        ngram_constants.head_sizes([2**31 - 19], 3, 1)
    for wished in (1, 2**31):
        with pytest.raises(ValueError, match="must be in"):
            ngram_constants.head_sizes([97, wished], 1, 1)


def test_what_does_not_fit_is_refused():
    ids, factors = jnp.zeros((1, 4), jnp.int32), np.ones(3, np.int64)
    for sizes, orders, message in [
        ((97, 1), (2,), "must be in"),
        ((97, 101, 103), (2, 3), "do not fit"),
        ((97, 101), (2, 4), "do not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            ngram_hash.ngram_slots(ids, factors, sizes, orders, pad_id=0)
    with pytest.raises(ValueError, match="previous"):
        ngram_hash.ngram_slots(ids, factors, (97,), (2,), pad_id=0, previous=ids)


def _has_no_divisor(n):
    return n > 1 and not any(n % d == 0 for d in range(2, int(n**0.5) + 1))
