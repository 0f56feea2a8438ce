"""P x K sampling."""

import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Batch
from pipeline.data.sampler import IdentitySampler


def labels_of(sizes):
    """Shuffled labels with gaps, `sizes[i]` images of the i-th identity."""
    labels = np.repeat(10 * np.arange(len(sizes)) + 3, sizes)
    return np.random.default_rng(0).permutation(labels)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=25),
    st.integers(2, 6),
    st.integers(2, 5),
    st.integers(0, 3),
    st.integers(1, 3),
)
def test_every_batch_has_p_different_identities_of_k_images_each(sizes, p, k, epoch, world):
    p = min(p, len(sizes))
    labels = labels_of(sizes)
    lengths = set()
    for rank in range(world):
        sampler = IdentitySampler(labels, Batch(identities=p, instances=k), 0, rank, world)
        batches = sampler.batches(epoch)
        assert len(batches) == len(sampler)
        lengths.add(len(batches))
        for batch in batches:
            groups = labels[batch].reshape(p, k)
            assert (groups == groups[:, :1]).all() and len(set(groups[:, 0])) == p
            for group, label in zip(batch.reshape(p, k), groups[:, 0], strict=True):
                assert len(set(group)) == min(k, (labels == label).sum())
    assert len(lengths) == 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=4, max_size=25), st.integers(2, 4), st.integers(2, 5))
def test_an_epoch_shows_each_image_about_once(sizes, p, k):
    labels = labels_of(sizes)
    sampler = IdentitySampler(labels, Batch(identities=p, instances=k), 0)
    shown = Counter(np.concatenate(sampler.batches(0)).tolist())
    chunks = {label: -(-count // k) for label, count in Counter(labels.tolist()).items()}
    if max(chunks.values()) <= len(sampler):  # otherwise one identity would be in a batch twice
        assert set(shown) == set(range(len(labels)))
    assert sum(shown.values()) < sum(chunks.values()) * k + p * k


def test_an_epoch_shows_each_image_once_if_the_chunks_divide_evenly():
    sampler = IdentitySampler(labels_of([12] * 30), Batch(identities=10, instances=4), 7)
    for epoch in range(3):
        assert len(sampler) == 9
        assert sorted(np.concatenate(sampler.batches(epoch))) == list(range(360))


def test_an_identity_with_more_chunks_than_batches_is_in_every_batch_and_displaces_no_other():
    labels = np.repeat(np.arange(9), [60, *[4] * 8])
    sampler = IdentitySampler(labels, Batch(identities=2, instances=4), 0)
    assert len(sampler) == 12  # (15 + 8) chunks / 2, rounded up
    for epoch in range(20):
        batches = sampler.batches(epoch)
        assert all(0 in labels[batch] for batch in batches)
        assert set(range(60, 92)) <= set(np.concatenate(batches).tolist())


def test_batches_depend_on_seed_and_epoch_alone():
    labels, batch = labels_of([9, 5, 12, 4, 8, 3]), Batch(identities=3, instances=4)

    def drawn(seed, epoch):
        return np.concatenate(IdentitySampler(labels, batch, seed).batches(epoch)).tolist()

    sampler = IdentitySampler(labels, batch, 0)
    sampler.batches(5)  # no state: epochs can be drawn in any order
    assert np.concatenate(sampler.batches(1)).tolist() == drawn(0, 1)
    assert len({str(drawn(seed, epoch)) for seed in range(2) for epoch in range(3)}) == 6


def test_processes_divide_the_batches_of_one_process():
    labels, batch = labels_of([8] * 12), Batch(identities=4, instances=4)
    all_batches = IdentitySampler(labels, batch, 0).batches(3)
    halves = [IdentitySampler(labels, batch, 0, rank, 2).batches(3) for rank in range(2)]
    assert len(halves[0]) == len(halves[1]) == 3
    for number, expected in enumerate(all_batches):
        np.testing.assert_array_equal(halves[number % 2][number // 2], expected)


def test_every_batch_has_another_set_of_identities():
    labels = labels_of([12] * 40)
    sampler = IdentitySampler(labels, Batch(identities=10, instances=4), 0)
    sets = {frozenset(labels[batch].tolist()) for batch in sampler.batches(0)}
    assert len(sets) == len(sampler)


def test_identities_with_few_images_are_logged_once(caplog):
    with caplog.at_level(logging.INFO):
        sampler = IdentitySampler(labels_of([1, 2, 8]), Batch(identities=3, instances=4), 0)
        sampler.batches(0)
        sampler.batches(1)
    assert caplog.text.count("2 identities have fewer than 4 images") == 1


def test_too_few_identities_are_refused():
    with pytest.raises(ValueError, match=r"batch of 4 identities cannot be filled from 3; lower `batch.identities`"):
        IdentitySampler(labels_of([5, 5, 5]), Batch(identities=4, instances=2), 0)
