"""What the environment says of the processes of a run."""

import platform
import re
import subprocess
import sys

import pytest
import torch

from fmkernels.focalmix.distributed import announced_processes, choose_device, process_group
from fmkernels.focalmix.errors import InputError

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
CPU = torch.device("cpu")


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def put(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    "values", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": " 1 ", "RANK": "3"}, {"RANK": "3"}]
)
def test_one_process(environment, values):
    environment(**values)
    assert announced_processes() == (0, 1)
    with process_group(CPU):
        assert not torch.distributed.is_initialized()


def test_processes_of_torchrun(environment):
    environment(WORLD_SIZE="4", RANK="3", MASTER_ADDR="localhost", MASTER_PORT="29500")
    assert announced_processes() == (3, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"WORLD_SIZE": "8"}, "RANK and MASTER_ADDR and MASTER_PORT beside it"),
        ({"WORLD_SIZE": "8", "RANK": "0", "MASTER_PORT": "1"}, "expected MASTER_ADDR beside it"),
        (
            {"WORLD_SIZE": "8", "RANK": "0", "MASTER_PORT": "1", "MASTER_ADDR": ""},
            "expected MASTER_ADDR beside it, as torchrun sets them; start with torchrun, or unset "
            "WORLD_SIZE (it is 8) to use one process",
        ),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE: expected a number"),
        (
            {"WORLD_SIZE": "2", "RANK": "-1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK: expected a number in this environment variable, got '-1'",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK: expected less than WORLD_SIZE (2), got 2",
        ),
    ],
)
def test_an_incomplete_environment_is_named(environment, values, message):
    environment(**values)
    with pytest.raises(InputError, match=re.escape(message)), process_group(CPU):
        raise AssertionError("not reached")


def test_processes_that_cannot_meet(environment):
    environment(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1000000")
    message = "process 0 of 2 cannot join the others at 127.0.0.1:1000000 .*port"
    with pytest.raises(InputError, match=message), process_group(CPU):
        raise AssertionError("not reached")


def test_an_empty_local_rank_counts_as_unset(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    environment(LOCAL_RANK="")
    assert choose_device("cuda") == torch.device("cuda", 0)
    environment(LOCAL_RANK="3")
    assert choose_device("cuda") == torch.device("cuda", 3)
    environment(LOCAL_RANK="x")
    with pytest.raises(InputError, match="LOCAL_RANK: expected a number"):
        choose_device("cuda")


FAULTS = """
import resource
import torch
from fmkernels.focalmix.distributed import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(48 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
keep_freed_memory(torch.device("cpu"))
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    before, after = map(int, done.stdout.split())
    assert after < before / 10, (before, after)
