"""How ranks share one training step: what each holds, and when they exchange gradients and weights.

    alone    one rank
    ddp      every rank holds all weights, gradients and moments; gradients are averaged
    zero1    as ddp, but each rank keeps the moments of a part of the parameters, moves that part and
             sends it to the others (Rajbhandari et al. 2020, stage 1)
    fsdp     every rank holds a slice of everything and gathers a block's weights when it comes to it
             (torch's fully_shard); on several nodes sliced inside a node and repeated over the nodes, or
             sliced over all of them where one does not hold it
    ordered  as ddp, but gradients are summed in one order whatever the number of ranks

All compute the same sums. They differ in rounding alone, and `ordered` not even in that. Weights stay
float32 where ranks exchange them, also in fsdp: the strategy is no setting that may change a result.
Gradients do too unless `training.gradient_exchange` says otherwise, which therefore is one that may.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from snakegpt.distributed import Group, Strategy, choose_slices
from snakegpt.errors import UserError
from snakegpt.model import GPT, n_parameters
from snakegpt.optimizer import Muon, clip_gradients, make_optimizers
from snakegpt.settings import Training, exchange_problem

Branch = tuple[range, list[Tensor]]  # neighbouring micro-batches, and the sum of their gradients


class Alone:
    """One rank, which shares with nobody; the others are this with a difference."""

    def __init__(self, model: GPT, recipe: Training, group: Group, *, compiled: bool) -> None:
        self.model, self.recipe, self.group, self.compiled = model, recipe, group, compiled
        self.network = self._wrapped()
        self.optimizers = self._optimizers()

    def _wrapped(self) -> nn.Module:
        """The model as the loop calls it."""
        return compiled(self.model) if self.compiled else self.model

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return make_optimizers(self.model, self.recipe)

    # ---- a step ----

    def begin(self, micro_batches: int) -> float:
        """Forget the gradients of the step before.

        micro_batches  that this rank takes in the step
        returns        what the mean loss of each counts in the gradient of this rank
        """
        self.model.zero_grad(set_to_none=True)
        return 1 / micro_batches

    def exchanging(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a micro-batch's passes; ranks exchange gradients with the last one of a step only."""
        return contextlib.nullcontext()

    def added(self) -> None:
        """A micro-batch's gradients have been added."""

    def finish(self) -> None:
        """All micro-batches of the step are through: bring the gradients to what all ranks agree on."""

    def unscale(self, scale: Tensor) -> None:
        """Divide the gradients by what the losses were multiplied by."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                _local(parameter.grad).div_(scale)

    def clip(self, limit: float | None) -> Tensor:
        """Scale the gradients to a common norm of at most `limit`; returns the norm before."""
        norm = clip_gradients(self.model.parameters(), limit)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded ones

    def step(self, skipped: Tensor) -> None:
        """Move the weights, unless `skipped` (a boolean on the device) says that nothing may change.

        The optimisers look at it on the device, as they do for torch's GradScaler, which named it.
        """
        found_inf = skipped.float()
        for optimizer in self.optimizers:
            if _skips_on_device(optimizer):
                optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            elif skipped.item():
                continue
            optimizer.step()

    def mean_loss(self, losses: list[Tensor]) -> Tensor:
        """Mean of the micro-batches' mean losses over all ranks."""
        return self.group.sum(torch.stack(losses).sum()) / (len(losses) * self.group.ranks)

    def rounds(self, n_batches: int) -> int:
        """How often a rank must call the model so that each of `n_batches` is taken by some rank."""
        return len(range(self.group.rank, n_batches, self.group.ranks))

    # ---- what is kept ----

    def whole_model(self) -> GPT | None:
        """The model with whole weights, on the leading rank at least; all ranks must ask."""
        return self.model

    def tensors(self) -> dict[str, Tensor]:
        """What a later run needs of weights and optimisers, by name; sharded as this rank holds it."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter, optimizer in self._moved():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def room_for(self, sizes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Tensors to load a state into, whose names and whole sizes are known; `take` puts them to use.

        What other ranks hold is left out.
        """
        room = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter, _ in self._moved():
            prefix = f"optimizer.{name}."
            for key in (key for key in sizes if key.startswith(prefix)):
                if sizes[key] == parameter.shape:
                    room[key] = torch.zeros_like(parameter.detach())
                else:  # a count of steps, whole on every rank
                    room[key] = torch.zeros(sizes[key], device=parameter.device)
        return room

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with the optimiser states that `room_for` made room for; weights are loaded in place."""
        for name, parameter, optimizer in self._moved():
            prefix = f"optimizer.{name}."
            mine = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            optimizer.state[parameter] = mine

    def _moved(self) -> Iterable[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        """Every parameter that this rank moves: its name, itself, and the optimiser that moves it."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield names[parameter], parameter, optimizer


class DataParallel(Alone):
    """ddp: torch's DistributedDataParallel; Muon's arithmetic is shared out as well."""

    network: DistributedDataParallel

    def _wrapped(self) -> nn.Module:
        network = DistributedDataParallel(super()._wrapped(), gradient_as_bucket_view=True)
        if self.recipe.gradient_exchange == "bfloat16":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            # Under another name: by its own DDP refuses it without NCCL, though gloo sums bfloat16 too.
            network.register_comm_hook(
                None, lambda group, bucket: bf16_compress_hook(group, bucket)
            )
        return network

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return make_optimizers(self.model, self.recipe, dist.group.WORLD)

    def exchanging(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if last:
            return contextlib.nullcontext()
        local: contextlib.AbstractContextManager[None] = self.network.no_sync()
        return local


class ZeRO1(DataParallel):
    """ddp whose optimiser states are dealt out, a whole parameter to a rank.

    torch's ZeroRedundancyOptimizer takes one optimiser class for all parameters; with Muon there are two.
    """

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        self.owners = dealt(
            {name: p.numel() for name, p in self.model.named_parameters()}, self.group.ranks
        )
        self._mine = {
            p for name, p in self.model.named_parameters() if self.owners[name] == self.group.rank
        }
        optimizers = make_optimizers(self.model, self.recipe)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p in self._mine]
        return optimizers

    @torch.no_grad()
    def step(self, skipped: Tensor) -> None:
        super().step(skipped)
        sent = [
            dist.broadcast(parameter.detach(), self.owners[name], async_op=True)
            for name, parameter in self.model.named_parameters()
        ]
        for work in sent:
            work.wait()


class FullyShardedDataParallel(Alone):
    """fsdp: torch's fully_shard, a block at a time."""

    # torch's sharded tensors take a second to load, which one rank has no use for.

    def _wrapped(self) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        mesh = self._mesh()
        for block in self.model.blocks:
            if self.compiled:
                block.compile(dynamic=False)
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        return self.model

    def _mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        device, ranks = next(self.model.parameters()).device.type, self.group.ranks
        slices = choose_slices(
            n_parameters(self.model.shape),
            ranks=ranks,
            local_ranks=self.group.local_ranks,
            device=device,
        )
        slices = -self.group.least(-slices)  # GPUs of one kind may differ by some bytes
        if slices == ranks:
            return init_device_mesh(device, (ranks,))
        return init_device_mesh(
            device, (ranks // slices, slices), mesh_dim_names=("replicate", "shard")
        )

    def exchanging(self, last: bool) -> contextlib.AbstractContextManager[None]:
        self.network: Any
        self.network.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def rounds(self, n_batches: int) -> int:
        # Every call gathers weights, so all ranks must make the same number of them.
        return -(-n_batches // self.group.ranks)

    def whole_model(self) -> GPT | None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        weights = get_model_state_dict(
            self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if not self.group.leads:
            return None
        with torch.device("meta"):
            model = GPT(self.model.shape)
        model.load_state_dict(weights, assign=True)
        return model


class Ordered(Alone):
    """Gradients summed in one order, so that any number of ranks ends at the same bits.

    A step's micro-batches are the leaves of one binary tree over the whole batch, in the batch's order:
    two neighbours are added, then two neighbouring sums, and so on. A rank adds what of the tree lies
    inside its own micro-batches; the sums that are left are gathered, and every rank finishes the tree.
    Their number does not depend on the ranks, nor may their size, the threads of a rank and the dropout
    draws; see `snakegpt.stages.train_model`.

    It costs memory for some more gradients (one for each branch that is waiting for its other half) and
    (ranks - 1) whole gradients of traffic a step where ddp sends less than two, after the last backward
    pass instead of beneath it.
    """

    def begin(self, micro_batches: int) -> float:
        super().begin(micro_batches)
        self._sums: list[Branch] = []  # left to right
        self._share, self._done = micro_batches, 0
        return 1 / (micro_batches * self.group.ranks)

    def added(self) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        place = self.group.rank * self._share + self._done
        self._sums = joined([*self._sums, (range(place, place + 1), gradients)])
        self._done += 1

    def finish(self) -> None:
        for index, parameter in enumerate(self.model.parameters()):
            sums = [(leaves, [gradients[index]]) for leaves, gradients in self._sums]
            if self.group.ranks > 1:
                sums = joined(self._gathered(sums))
            [parameter.grad] = whole(sums, self._share * self.group.ranks)

    def _gathered(self, mine: list[Branch]) -> list[Branch]:
        """The branches of all ranks, which may have different numbers of them, left to right."""
        branches = [
            _branches(range(rank * self._share, (rank + 1) * self._share))
            for rank in range(self.group.ranks)
        ]
        assert [leaves for leaves, _ in mine] == branches[self.group.rank]
        everything = []
        for index in range(max(map(len, branches))):
            [sent] = mine[min(index, len(mine) - 1)][1]  # in vain where there is none
            for theirs, received in zip(branches, self._from_all(sent), strict=True):
                if index < len(theirs):
                    everything.append((theirs[index], [received]))
        return sorted(everything, key=lambda item: item[0].start)

    def _from_all(self, tensor: Tensor) -> list[Tensor]:
        received = [torch.empty_like(tensor) for _ in range(self.group.ranks)]
        dist.all_gather(received, tensor.contiguous())
        return received

    def mean_loss(self, losses: list[Tensor]) -> Tensor:
        everyones = losses[0].new_zeros(self.group.ranks, len(losses))
        everyones[self.group.rank] = torch.stack(losses)
        # Adding the others' zeros is exact, so all see the same numbers and add them in one order.
        return self.group.sum(everyones).flatten().sum() / everyones.numel()


def compiled(model: nn.Module) -> nn.Module:
    """The model compiled for each size of batch that it meets: a general size costs speed."""
    network: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return network


def joined(sums: list[Branch]) -> list[Branch]:
    """Add neighbouring branches, left to right, while two are the halves of a larger one."""
    done: list[Branch] = []
    for leaves, gradients in sums:
        while done and _are_halves(done[-1][0], leaves):
            left, others = done.pop()
            leaves, gradients = range(left.start, leaves.stop), _added(others, gradients)
        done.append((leaves, gradients))
    return done


def whole(sums: list[Branch], leaves: int) -> list[Tensor]:
    """The sum of the whole tree; where its leaves are no power of two, the last branches are added first."""
    (found, total), *others = reversed(sums)
    for left, gradients in others:
        assert left.stop == found.start
        found, total = range(left.start, found.stop), _added(gradients, total)
    assert found == range(leaves)
    return total


def _added(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(left, right)
    return left


def _are_halves(left: range, right: range) -> bool:
    return len(left) == len(right) and left.start % (2 * len(left)) == 0


def _branches(leaves: range) -> list[range]:
    """The largest whole branches of the tree that lie inside some neighbouring leaves, left to right."""
    branches = []
    start = leaves.start
    while start < leaves.stop:
        size = start & -start if start else 1 << leaves.stop.bit_length()
        while start + size > leaves.stop:
            size //= 2
        branches.append(range(start, start + size))
        start += size
    return branches


def dealt(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank owns which parameter: the largest first, each to the rank that has least so far."""
    load = [0] * ranks
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, Muon) or bool(optimizer.defaults.get("fused"))


def make_strategy(
    name: Strategy,
    model: GPT,
    recipe: Training,
    group: Group,
    *,
    compiled: bool,
    deterministic: bool = False,
) -> Alone:
    """The strategy of a run; one rank shares nothing, whatever the name.

    model          on its device, with its first weights
    compiled       whether to compile the model
    deterministic  sum gradients in one order for any number of ranks
    raises         UserError if it cannot exchange gradients as the recipe says
    """
    if problem := exchange_problem(recipe, name, deterministic=deterministic):
        raise UserError(problem)
    kinds = {"ddp": DataParallel, "zero1": ZeRO1, "fsdp": FullyShardedDataParallel}
    kind = Ordered if deterministic else kinds[name] if group.ranks > 1 else Alone
    return kind(model, recipe, group, compiled=compiled)
