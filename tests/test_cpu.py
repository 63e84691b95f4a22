"""What ops share on the CPU: threads, forks, concurrent callers, caches, arithmetic."""

import gc
import multiprocessing
import os
import random
import runpy
import signal
import sys
import threading
import time
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import fmkernels.cpu
from fmkernels import (
    crop_and_resize3d,
    group_norm3d,
    mixup3d,
    object_mixup3d,
    predict_targets,
    soft_target_focal_loss,
)
from fmkernels.cpu import arithmetic, voxels
from fmkernels.cpu.compiled import INT16, UINT8, _Pool, located, njit, parallel_for
from tests.support.threads import finely_split

GRID = torch.arange(40**3).reshape(1, 1, 40, 40, 40)
VOLUMES = torch.cat([(GRID * step % 4001 - 2000).to(torch.int16) for step in (7, 11, 13, 17)])
VIEWS = (torch.cat([VOLUMES, VOLUMES.flip(0)], 1) / 500).expand(2, -1, -1, -1, -1, -1)
BOXES = torch.tensor([[k % 4, 1.5 + k, 2, 3, 12.5 + k, 18, 30] for k in range(16)])
LAM, INDEX = torch.tensor([0.5, 0.6, 0.7, 0.8]), torch.tensor([1, 2, 3, 0])
WINDOW = (-1000.0, 400.0)


def loss(reduction):
    logits = (VOLUMES / 500).requires_grad_()
    losses = soft_target_focal_loss(
        logits, VOLUMES.abs() / 4000, mix=(LAM, INDEX), reduction=reduction
    )
    return losses.detach(), *torch.autograd.grad(losses.sum(), logits)


def crop():
    volumes = VOLUMES.float().requires_grad_()
    crops = crop_and_resize3d(volumes, BOXES, (20, 24, 28), window=WINDOW)
    return crops.detach(), *torch.autograd.grad(crops.square().sum(), volumes)


def mix():
    volumes, flips = VOLUMES.float().requires_grad_(), torch.tensor([0, 3, 5, 6], dtype=torch.uint8)
    mixed = mixup3d(volumes, LAM, INDEX, flips=flips)
    return mixup3d(VOLUMES, LAM, INDEX, window=WINDOW), *torch.autograd.grad(
        mixed.square().sum(), volumes
    )


def norm(layout):
    x = (VOLUMES.float() / 500).view(4, 8, 20, 20, 20).to(memory_format=layout).requires_grad_()
    y = group_norm3d(x, 2, activation="relu")
    return y.detach(), *torch.autograd.grad(y.square().sum(), x)


CALLS = {
    "group_norm3d contiguous": lambda: norm(torch.contiguous_format),
    "group_norm3d channels last": lambda: norm(torch.channels_last_3d),
    "soft_target_focal_loss mean": lambda: loss("mean"),
    "soft_target_focal_loss none": lambda: loss("none"),
    "predict_targets": lambda: (
        predict_targets(VIEWS, torch.tensor([1, 6]).byte()),
        predict_targets(VIEWS, torch.tensor([13, 47]).byte(), classes=2),
    ),
    "mixup3d": mix,
    "crop_and_resize3d": crop,
    "object_mixup3d": lambda: (
        object_mixup3d(VOLUMES, BOXES, BOXES.flip(0), torch.full((16,), 0.6), window=WINDOW),
    ),
}


@pytest.fixture
def threads():
    """Sets how many threads torch allows, until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def equal(results, others):
    return len(results) == len(others) and all(map(torch.equal, results, others))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_number_of_threads_changes_no_bit(call, threads):
    threads(1)
    alone = call()
    for number in (2, 5):
        with finely_split(number):
            assert equal(call(), alone)


def test_a_range_is_shared_out_over_threads(threads):
    def loop(start, end, parts):
        meeting.wait()  # breaks unless all parts run at once
        parts.append((start, end))

    meeting = threading.Barrier(3, timeout=20)
    threads(3)
    parts = []
    if (os.cpu_count() or 1) >= 2:
        parallel_for(loop, 100, 30, (), parts)
        assert sorted(parts) == [(0, 33), (33, 66), (66, 100)]
    meeting = threading.Barrier(1)
    parts.clear()
    parallel_for(loop, 100, 51, (), parts)
    assert parts == [(0, 100)]


@pytest.mark.parametrize("row", [0, 3])
def test_an_error_in_any_thread_reaches_the_caller(row, threads):
    threads(4)
    index = INDEX.clone()
    index[row] = 4
    with pytest.raises(ValueError, match="mix index must lie in"):
        soft_target_focal_loss(VOLUMES.float(), VOLUMES.abs() / 4000, mix=(LAM, index))


def test_concurrent_callers_do_not_disturb_each_other(threads):
    threads(2)
    alone = {name: call() for name, call in CALLS.items()}
    with ThreadPoolExecutor(4) as callers:
        calls = [(name, callers.submit(CALLS[name])) for name in list(CALLS) * 4]
        for name, future in calls:
            assert equal(future.result(timeout=60), alone[name]), name


class Calls(torch.utils.data.Dataset):
    """One operation for each item."""

    def __len__(self):
        return len(CALLS)

    def __getitem__(self, i):
        return list(CALLS.values())[i]()


def forks(test):
    """For a test that forks a process which has threads, as PyTorch's loaders do."""
    test = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")(
        test
    )
    return pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")(test)


@forks
def test_forked_workers_of_a_parent_that_has_threads(threads):
    threads(2)
    alone = [call() for call in CALLS.values()]
    loader = DataLoader(
        Calls(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for results, expected in zip(loader, alone, strict=True):
        assert equal(results, expected)


@forks
def test_a_forked_process_has_threads_of_its_own(threads):
    threads(2)

    def use_both():
        parallel_for(lambda start, end: meeting.wait(), 2, 1, ())

    meeting = threading.Barrier(2, timeout=20)
    use_both()
    child = multiprocessing.get_context("fork").Process(target=use_both)
    child.start()
    child.join(timeout=30)
    assert child.exitcode == 0


def test_compiles_where_nothing_can_be_kept():
    """Numba cannot cache functions without a file or in a read-only folder."""
    names = {}
    exec("def double(x):\n    return 2 * x", names)
    assert njit(names["double"])(3) == 6


def test_a_missing_numba_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(
        ImportError,
        match=r"^fmkernels: operations on the CPU need numba \(pip install numba\): .+$",
    ):
        runpy.run_path(fmkernels.cpu.__file__)


def loop_of(function):
    @njit
    def loop(x, out):
        for i in range(x.size):
            out[i] = function(x[i])

    return loop


EVERY = (
    np.arange(0, 2**32, 1009, dtype=np.uint64).astype(np.uint32).view(np.float32)
)  # of all signs, sizes and NaN
SPECIAL = np.array(
    [0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 2**-126, 88.73, -103.97], np.float32
)
CLOSE = np.linspace(-3, 3, 200_003).astype(np.float32)


@pytest.mark.parametrize("name", ["exp", "log", "log1p"])
def test_float32_functions_are_within_a_unit_in_the_last_place(name):
    x = np.concatenate([EVERY, SPECIAL, CLOSE])
    x = x[~((x < 0) | (x > 1))] if name == "log1p" else x
    result = np.empty_like(x)
    loop_of(getattr(arithmetic, name))(x, result)
    with np.errstate(all="ignore"):
        exact = getattr(np, name)(x.astype(np.float64))
        rounded = exact.astype(np.float32)
        finite = np.isfinite(rounded)
        np.testing.assert_array_equal(result[~finite], rounded[~finite])
        error = np.abs(result[finite] - exact[finite]) / np.spacing(np.abs(rounded[finite]))
    assert error.max() <= 1.1
    assert error[rounded[finite] != exact[finite]].mean() <= 0.4


def test_float32_sigmoid():
    """Its error grows with |x|, as that of the exponent does; infinities are 0 and 1."""
    x = np.concatenate([EVERY, SPECIAL, CLOSE, 30 * CLOSE])
    result = np.empty_like(x)
    loop_of(arithmetic.sigmoid)(x, result)
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        exact = 1 / (1 + np.exp(-wide))
    assert np.isnan(result[np.isnan(x)]).all()
    np.testing.assert_array_equal(result[x < -88.4], 0)
    np.testing.assert_array_equal(result[x > 88.8], 1)
    normal = (x > -87) & (x < 88.8)
    error = np.abs(result - exact)[normal] / exact[normal]
    assert (error <= 2**-24 * (1.25 * np.abs(wide[normal]) + 4)).all()


def test_float64_sigmoid():
    x = np.concatenate([np.linspace(-700, 40, 1001), [np.inf, -np.inf, np.nan]])
    result = np.empty_like(x)
    loop_of(arithmetic.sigmoid)(x, result)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(result, 1 / (1 + np.exp(-x)), rtol=4e-16)


@pytest.mark.parametrize("name", ["exp", "log", "log1p"])
def test_float64_functions_are_those_of_the_c_library(name):
    x = np.concatenate([np.linspace(0, 1, 1001), [1e-300, 5e-324, np.inf, np.nan]])
    x = x if name == "log1p" else np.concatenate([x, np.linspace(-750, 750, 1001)])
    result = np.empty_like(x)
    loop_of(getattr(arithmetic, name))(x, result)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(result, getattr(np, name)(x), rtol=4e-16)


@njit
def convert_block(source, target, size):
    block = voxels.empty(size, np.float32)
    voxels.load_block(source[0], source[1], 0, block)
    voxels.store_block(block, target[0], target[1], 0)


def convert(source, target):
    convert_block(*located(source, target), source.numel())


def test_bfloat16_is_read_and_rounded_as_torch_does():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    read = torch.empty(2**16)
    convert(every, read)
    torch.testing.assert_close(read, every.float(), rtol=0, atol=0, equal_nan=True)
    ties = (EVERY.view(np.uint32) & np.uint32(0xFFFF0000) | np.uint32(0x8000)).view(np.float32)
    between = torch.from_numpy(np.concatenate([EVERY, ties]))
    rounded = torch.empty(len(between), dtype=torch.bfloat16)
    convert(between, rounded)
    torch.testing.assert_close(rounded, between.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8])
def test_integers_round_to_nearest_even_and_saturate(dtype):
    limits = torch.iinfo(dtype)
    x = torch.cat(
        [torch.arange(-1000, 1000) / 4, torch.tensor([np.inf, -np.inf, 1e9, -1e9, 40000.0, np.nan])]
    )
    result = torch.empty(len(x), dtype=dtype)
    convert(x, result)
    assert torch.equal(
        result, x.nan_to_num(nan=0.0).round().clamp(limits.min, limits.max).to(dtype)
    )


def test_an_interrupted_call_leaves_before_its_helpers_and_they_keep_its_tensors(monkeypatch):
    began, release, ended = threading.Event(), threading.Event(), threading.Event()
    held = []

    def loop(start, end, tensor, array):
        if threading.current_thread() is threading.main_thread():
            began.wait(10)
            raise KeyboardInterrupt
        began.set()
        release.wait(10)
        held.append(alive() is not None)
        ended.set()

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = torch.ones(3)
    alive = weakref.ref(x)
    with pytest.raises(KeyboardInterrupt):
        parallel_for(loop, 2, 1, (x,), x.numpy())
    assert began.is_set() and not ended.is_set()
    del x
    release.set()
    assert ended.wait(10) and held == [True]
    for _ in range(100):  # until the helper has left
        gc.collect()
        if alive() is None:
            break
        time.sleep(0.05)
    assert alive() is None


def test_tensors_are_addresses_with_dtype_codes():
    x, taken = torch.ones(3, dtype=torch.int16), []
    parallel_for(lambda start, end, *args: taken.append(args), 1, 1, (x, None), 7)
    assert taken == [((x.data_ptr(), INT16), (0, UINT8), 7)]


@pytest.fixture
def pool(monkeypatch):
    """A pool of at most one thread, which has not started."""
    pool = _Pool()
    monkeypatch.setattr("fmkernels.cpu.compiled._pool", lambda: pool)
    monkeypatch.setattr("fmkernels.cpu.compiled.os.cpu_count", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    return pool


def test_without_threads_the_caller_runs_all_ranges(pool, monkeypatch):
    done = []
    monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start")))
    parallel_for(lambda start, end: done.append((start, end)), 9, 1, ())
    assert done == [(0, 3), (3, 6), (6, 9)] and pool.tasks.empty() and not pool.threads


def test_helpers_busy_for_another_caller_are_not_waited_for(pool):
    """The task that remains in the queue holds no tensor, and does nothing later."""
    release, done, x = threading.Event(), [], torch.ones(3)
    pool.help(1, deque([lambda: release.wait(20)]), SimpleQueue())
    parallel_for(lambda start, end, x: done.append((start, end)), 9, 1, (x,))
    assert done == [(0, 3), (3, 6), (6, 9)] and not pool.tasks.empty() and not release.is_set()
    alive = weakref.ref(x)
    del x
    assert alive() is None
    release.set()
    ended = SimpleQueue()
    pool.help(1, deque([int]), ended)  # after the one in the queue
    assert ended.get(timeout=20) is None and len(done) == 3


@pytest.mark.parametrize("in_caller", [True, False])
def test_after_an_error_no_range_is_begun(in_caller, monkeypatch):
    begun, others = [], threading.Event()

    def loop(start, end):
        begun.append(start)
        if in_caller == (threading.current_thread() is threading.main_thread()):
            others.set()
            raise ZeroDivisionError
        others.wait(10)
        time.sleep(0.1)  # the other thread clears the ranges

    class Ranges(deque):  # four ranges for two threads
        def __init__(self, ranges):
            super().__init__(list(ranges) * 2)

    monkeypatch.setattr("fmkernels.cpu.compiled.deque", Ranges)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ZeroDivisionError):
        parallel_for(loop, 2, 1, ())
    assert len(begun) <= 2


def test_an_error_leaves_no_cycle_that_holds_tensors(monkeypatch):
    def loop(start, end, x):
        meeting.wait(10)
        if threading.current_thread() is not threading.main_thread():
            raise ZeroDivisionError

    meeting = threading.Barrier(2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = torch.ones(3)
    alive = weakref.ref(x)
    gc.collect()
    gc.disable()
    try:
        with suppress(ZeroDivisionError):
            parallel_for(loop, 2, 1, (x,))
        del x
        for _ in range(100):  # until the helper has left
            if alive() is None:
                break
            time.sleep(0.05)
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that send signals")
def test_interrupts_at_any_time(monkeypatch):
    """A call returns or raises KeyboardInterrupt. Later calls are complete."""
    interrupted, armed = 0, False

    def interrupt(*_):
        if armed:
            raise KeyboardInterrupt

    def loop(start, end, done):
        time.sleep(1e-4)
        done.append((start, end))

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    before, draw = signal.signal(signal.SIGALRM, interrupt), random.Random(0)
    try:
        for _ in range(1000):
            done = []
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 6e-4))
                parallel_for(loop, 3, 1, (), done)
                armed = False
                assert sorted(done) == [(0, 1), (1, 2), (2, 3)]
            except KeyboardInterrupt:
                armed = False
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 100
    done = []
    parallel_for(loop, 3, 1, (), done)
    assert sorted(done) == [(0, 1), (1, 2), (2, 3)]
