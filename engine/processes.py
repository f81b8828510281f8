"""Several processes under torchrun: ranks, sharding, sums and gathers."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from engine import Refused, first_line, telling

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # a launcher like torchrun sets all


def ranks() -> tuple[int, int]:
    """(rank, number of processes) as a launcher set them; (0, 1) without one, whatever single variables say. (vLLM
    initialises torch.distributed in any process, so that says nothing.)"""
    if not all(os.environ.get(name) for name in LAUNCHED):
        return 0, 1
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        rank, world = 0, 0
    if not 0 <= rank < world:
        raise Refused(f"RANK={os.environ['RANK']} of WORLD_SIZE={os.environ['WORLD_SIZE']}: no launcher sets that")
    return rank, world


def start_processes() -> tuple[int, int]:
    """`ranks`, once the processes have met. Only rank 0 prints."""
    _, world = ranks()
    if world > 1:
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            with telling(lambda: f"  waiting for all {world} processes"):
                backend = "nccl" if torch.cuda.is_available() else "gloo"
                ThreadPoolExecutor(1).submit(dist.init_process_group, backend).result()  # this thread hears signals
        except Exception as error:
            raise Refused(f"the {world} processes do not find each other: {first_line(error)}") from error
        atexit.register(end_processes)
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return ranks()


def end_processes() -> None:
    """Before the interpreter exits: a thread of the process group that asks for its lock after that aborts the process.
    The threads run as long as something refers to the group: here device meshes, which caches of torch keep."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for mesh in [thing for thing in gc.get_objects() if type(thing) is DeviceMesh]:
        vars(mesh).get("_pg_registry", {}).clear()
    gc.collect()


def sum_over_ranks(values: list[float]) -> list[float]:
    """Each value summed over the processes."""
    return [sum(of_all) for of_all in zip(*gather_over_ranks([values]))]


def gather_over_ranks(items: list) -> list:
    """The lists of all processes, joined."""
    if ranks()[1] == 1:
        return items
    parts: list = [None] * ranks()[1]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def wait_for_ranks() -> None:
    if ranks()[1] > 1:
        dist.barrier()


def shard(model, dtype: torch.dtype, scores: Callable) -> Callable:
    """PyTorch's FSDP2: every process keeps a share of each weight, its gradient and its moments, and gathers a layer
    when it computes it. Returns `scores` of the model, which may use weights outside of `forward`."""
    low = dtype != torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if low else MixedPrecisionPolicy()
    lists = [module for module in model.base_model.modules() if isinstance(module, torch.nn.ModuleList)]
    for layer in max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=[]):  # the blocks
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.scores = types.MethodType(scores, model)
    register_fsdp_forward_method(model, "scores")
    return model.scores


def full_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of a model that may be sharded; a collective, so every process goes through all of it."""
    for name, tensor in model.state_dict().items():
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
