"""How a launch finds its program that finishes last, which can then use the results of all."""

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 512  # made at once
APART = 32  # int32 from one counter to the next: a cache line

_unused: dict[torch.device, list[Tensor]] = {}
_made: dict[torch.device, torch.cuda.Event] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_lock = Lock()


@triton.jit
def is_last(arrived):
    """Whether all other programs of the launch were here: what they have stored is then visible.

    ``arrived`` points to a counter, 0 before the launch and 0 after it.
    """
    tl.debug_barrier()  # the stores of all threads come before the count of one of them
    last = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(arrived, 0)
    return last


def arrival_counter(device: torch.device) -> Tensor:
    """An int32 of value 0 that no other launch uses at the same time.

    Launches of one stream run one after the other, so they share a counter. A captured launch may
    run at any time on any stream, so its counter is never given again.
    """
    if device.type != "cuda":  # interpreted, perhaps not to the end, or recorded
        return torch.zeros(1, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        with _lock:
            if unused := _unused.get(device):
                return unused.pop()
        # memory of the graph, which clears it whenever it runs: one launch more
        return torch.zeros(1, dtype=torch.int32, device=device)
    stream = device, triton.runtime.driver.active.get_current_stream(device.index)
    if stream not in _of_stream or not _unused[device]:
        with _lock:
            if not _unused.get(device):
                # Another thread is in no memory pool. This one may be, where a graph is warmed up,
                # and the pool would give the counters away again.
                with ThreadPoolExecutor(1) as thread:
                    _unused[device], _made[device] = thread.submit(_make, device).result()
            torch.cuda.current_stream(device).wait_event(_made[device])
            _of_stream.setdefault(stream, _unused[device].pop())
    return _of_stream[stream]


def _make(device: torch.device) -> tuple[list[Tensor], torch.cuda.Event]:
    with torch.cuda.device(device):
        counters = torch.zeros(COUNTERS, APART, dtype=torch.int32, device=device)
        made = torch.cuda.Event()
        made.record()
    return list(counters[:, :1].unbind()), made
