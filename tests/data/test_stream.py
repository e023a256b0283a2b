from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from studytool.data.shards import open_dataset
from studytool.data.stream import RING, Stream, epoch_order


@pytest.fixture(scope="module")
def dataset(dataset_folder):
    return open_dataset(dataset_folder)


def copies(batches):
    return [(batch.volumes_B1DHW.clone(), batch.labels_B.clone(), batch.rows_B) for batch in batches]


def order_of(stream, epoch, start_batch=0):
    return np.concatenate([batch.rows_B for batch in stream.epoch(epoch, start_batch)])


# order


def test_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    order = epoch_order(1000, seed=3, epoch=5)
    assert sorted(order.tolist()) == list(range(1000))
    np.testing.assert_array_equal(order, epoch_order(1000, seed=3, epoch=5))
    assert (order != epoch_order(1000, seed=4, epoch=5)).any()
    assert (order != epoch_order(1000, seed=3, epoch=6)).any()
    assert len(epoch_order(0, seed=0, epoch=0)) == 0


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
def test_any_number_of_workers_gives_each_row_once(num_workers):
    parts = [epoch_order(100, seed=1, epoch=2, worker=w, num_workers=num_workers) for w in range(num_workers)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_order_has_nothing_to_do_with_storage():
    for epoch in range(5):
        order = epoch_order(20_000, seed=0, epoch=epoch)
        assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.02
        neighbours = np.abs(np.diff(order)).mean() / (20_000 / 3)  # 1 for independent draws
        assert abs(neighbours - 1) < 0.02


def test_batches_mix_classes_like_independent_draws(dataset):
    """The variance of a class's count per batch is that of drawing without replacement."""
    stream = Stream(dataset, np.arange(600), batch_size=60, seed=1, shuffle=True)
    counts = [int((batch.labels_B == 0).sum()) for epoch in range(60) for batch in stream.epoch(epoch)]
    expected = 60 * (1 / 3) * (2 / 3) * (600 - 60) / (600 - 1)
    assert np.mean(counts) == pytest.approx(20)
    assert np.var(counts) == pytest.approx(expected, rel=0.2)


# batches


@pytest.mark.parametrize("batch_size", [7, 64, 1000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_once_with_its_own_volume_and_label(dataset, volumes, batch_size, shuffle):
    rows = dataset.rows("train")
    stream = Stream(dataset, rows, batch_size=batch_size, seed=1, shuffle=shuffle)
    got = copies(stream.epoch(0))
    assert len(got) == len(stream) == -(-len(rows) // batch_size)
    order = np.concatenate([batch_rows for _, _, batch_rows in got])
    assert sorted(order.tolist()) == rows.tolist()
    assert (order.tolist() == rows.tolist()) == (not shuffle)
    assert all(len(batch_rows) == min(batch_size, 360) for _, _, batch_rows in got[:-1])
    for batch_volumes, labels, batch_rows in got:
        assert batch_volumes.dtype == torch.float16
        assert batch_volumes.shape == (len(batch_rows), 1, 6, 6, 6)
        np.testing.assert_array_equal(batch_volumes.squeeze(1).numpy(), volumes[batch_rows])
        np.testing.assert_array_equal(labels.numpy(), dataset.labels[batch_rows])


def test_a_batch_stays_valid_until_the_next_one_is_asked_for(dataset, volumes):
    stream = Stream(dataset, np.arange(600), batch_size=16, seed=1, shuffle=True)
    for batch in stream.epoch(0):
        time.sleep(0.002)  # the thread is filling the next one by now
        np.testing.assert_array_equal(batch.volumes_B1DHW.squeeze(1).numpy(), volumes[batch.rows_B])


def test_buffers_are_used_again(dataset):
    stream = Stream(dataset, np.arange(600), batch_size=16, seed=1, shuffle=True)
    addresses = {batch.volumes_B1DHW.data_ptr() for epoch in range(3) for batch in stream.epoch(epoch)}
    assert len(addresses) == RING


def test_a_resumed_epoch_goes_on_where_it_stopped(dataset):
    stream = Stream(dataset, dataset.rows("train"), batch_size=32, seed=9, shuffle=True)
    whole = order_of(stream, epoch=4)
    np.testing.assert_array_equal(whole, order_of(stream, epoch=4))
    again = Stream(dataset, dataset.rows("train"), batch_size=32, seed=9, shuffle=True)
    np.testing.assert_array_equal(whole[3 * 32 :], order_of(again, epoch=4, start_batch=3))
    assert list(stream.epoch(4, start_batch=len(stream))) == []
    assert (whole != order_of(stream, epoch=5)).any()


def test_two_epochs_at_once_do_not_share_buffers(dataset, volumes):
    stream = Stream(dataset, np.arange(600), batch_size=50, seed=1, shuffle=True)
    for one, other in zip(stream.epoch(0), stream.epoch(1), strict=True):
        np.testing.assert_array_equal(one.volumes_B1DHW.squeeze(1).numpy(), volumes[one.rows_B])
        np.testing.assert_array_equal(other.volumes_B1DHW.squeeze(1).numpy(), volumes[other.rows_B])


def test_an_epoch_left_early_leaves_no_thread(dataset):
    def gathering():
        return [thread for thread in threading.enumerate() if thread.name.startswith("studytool-gather")]

    batches = Stream(dataset, np.arange(600), batch_size=8, seed=1, shuffle=True).epoch(0)
    next(batches)
    assert gathering()
    batches.close()
    assert not gathering()


def test_trouble_in_the_thread_reaches_the_consumer(dataset):
    stream = Stream(dataset, np.array([0, 5, 600]), batch_size=2, seed=1, shuffle=False)
    batches = stream.epoch(0)
    with pytest.raises(IndexError, match="600 volumes"):
        list(batches)


def test_no_rows_and_no_batch_size(dataset):
    assert list(Stream(dataset, np.array([]), batch_size=4, seed=0, shuffle=True).epoch(0)) == []
    with pytest.raises(ValueError, match="batch_size"):
        Stream(dataset, np.arange(3), batch_size=0, seed=0, shuffle=True)


def test_opening_a_dataset_does_not_import_torch_or_pandas(dataset_folder):
    code = (
        "import sys, pathlib; from studytool.data import shards, stream, simulate; "
        "shards.open_dataset(pathlib.Path(sys.argv[1])).rows('train'); "
        "print([name for name in ('torch', 'pandas', 'ray', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, dataset_folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_batches_survive_until_the_device_has_copied_them(dataset, volumes):
    stream = Stream(dataset, np.arange(600), batch_size=16, seed=1, shuffle=True, pin_memory=True)
    busy = torch.randn(4096, 4096, device="cuda")
    for epoch in range(3):
        on_device = []
        for batch in stream.epoch(epoch):
            busy = torch.tanh(busy @ busy)  # keeps the device behind the host, so that copies wait in its queue
            on_device.append((batch.volumes_B1DHW.to("cuda", non_blocking=True), batch.rows_B))
        for copied, rows in on_device:
            np.testing.assert_array_equal(copied.squeeze(1).cpu().numpy(), volumes[rows])
