"""Counters of finished programs: no two launches that may run at once share one."""

from threading import get_ident
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from fmkernels.kernels import arrivals
from tests.support import on_gpu
from tests.triton_checked.interpreter import checked

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in: its current stream, whether that is captured, and what was allocated."""
    gpu = SimpleNamespace(stream=0, capturing=False, made=[], waits=[], in_graphs=0)
    zeros = torch.zeros

    def make(device):
        gpu.made.append(get_ident())
        rows = zeros(arrivals.COUNTERS, arrivals.APART, dtype=torch.int32)
        return list(rows[:, :1].unbind()), "made"

    def zeros_in_a_graph(*_, **__):
        assert gpu.capturing
        gpu.in_graphs += 1
        return SimpleNamespace(data_ptr=lambda: -gpu.in_graphs)

    def stream(device):
        return SimpleNamespace(wait_event=lambda event: gpu.waits.append((gpu.stream, event)))

    active = SimpleNamespace(get_current_stream=lambda index: gpu.stream)
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(arrivals, "_make", make)
    monkeypatch.setattr(torch, "zeros", zeros_in_a_graph)
    for kept in ("_unused", "_made", "_of_stream"):
        monkeypatch.setattr(arrivals, kept, {})
    return gpu


def counter(gpu, stream=0, capturing=False):
    gpu.stream, gpu.capturing = stream, capturing
    return arrivals.arrival_counter(DEVICE).data_ptr()


pytestmark = pytest.mark.skipif(on_gpu(), reason="stand-ins for a GPU")


def test_a_stream_keeps_its_counter(gpu):
    first, other = counter(gpu), counter(gpu, stream=7)
    assert first != other and {first, other} == {counter(gpu, s) for s in (0, 7, 7, 0)}
    assert first % 16 == other % 16 == 0, "the JIT would compile variants"
    assert gpu.waits == [(0, "made"), (7, "made")]  # until the counters are cleared


def test_counters_are_made_outside_of_the_memory_pool_of_this_thread(gpu):
    counter(gpu)
    assert len(gpu.made) == 1 and get_ident() not in gpu.made


def test_a_captured_launch_shares_its_counter_with_none(gpu):
    seen = {counter(gpu)}
    captured = [counter(gpu, capturing=True) for _ in range(arrivals.COUNTERS + 3)]
    assert gpu.in_graphs == 4  # one of those made was the stream's
    seen.update(captured, [counter(gpu, stream=3)])  # and more are made outside of captures
    assert len(seen) == len(captured) + 2 and len(gpu.made) == 2
    assert counter(gpu, capturing=True) not in seen and gpu.in_graphs == 4


def test_a_capture_before_any_other_launch_clears_its_counter_itself(gpu):
    captured = {counter(gpu, capturing=True) for _ in range(3)}
    assert len(captured) == gpu.in_graphs == 3 and not gpu.made


@triton.jit
def _who_is_last(arrived, last):
    if arrivals.is_last(arrived):
        tl.store(last, tl.program_id(0))


@pytest.mark.parametrize("programs", [1, 2, 9])
def test_one_program_is_last_in_any_order_and_clears_the_counter(programs):
    arrived, found = torch.zeros(1, dtype=torch.int32), set()
    for seed in range(20):
        last = torch.full((1,), -1, dtype=torch.int32)
        with checked(shuffle=seed):
            _who_is_last[(programs,)](arrived, last)
        assert arrived.item() == 0
        found.add(last.item())
    assert found <= set(range(programs)) and len(found) > programs // 4
