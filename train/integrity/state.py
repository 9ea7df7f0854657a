"""Weights and optimizer state compared by fingerprints: between two updates, and across data-parallel ranks.

    update s-1 --> fingerprints of this rank's masters and moments
                       |  forward and backward of step s: nothing may write to them
    update s   <-- the same fingerprints?   weights: the same on all data-parallel ranks?

With the distributed optimizer every data-parallel rank has all weights of its model part, gathered after each update, so they are
the same bits everywhere. Masters and moments exist once: no other rank has a copy to compare with, but between two updates they
must rest. Experts are compared within their own data-parallel group.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from train.checkpoint import fingerprint
from train.checkpoint.fingerprint import Sums
from train.checkpoint.pieces import local_tensors_of, optimizer_parts
from train.engine import Engine
from train.integrity.findings import Finding, host_name, odd_ones

DETECTOR = "the comparison of state"


@dataclass(frozen=True)
class _Named:
    name: str
    tensor: torch.Tensor

    def sums(self) -> Sums:
        flat = self.tensor.detach().reshape(-1)
        return fingerprint.of_box(flat, whole=flat.shape, offset=(0,), shape=flat.shape)


class StateWatch:
    """The state of one engine. Its tensors are looked up once; they stay the same objects for the whole run."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        groups = engine.mesh.groups
        modules = [chunk.module for chunk in engine.chunks]
        named = [(f"{i}/{name}", p) for i, module in enumerate(modules) for name, p in module.named_parameters()]
        self._replicated: list[tuple[Any, list[_Named]]] = [
            (group, [_Named(name, p) for name, p in named if getattr(p, "allreduce", True) == is_dense])
            for group, is_dense in ((groups.dp_cp, True), (groups.expt_dp, False))
        ]
        saved_names = [module.state_dict(keep_vars=True).keys() for module in modules]
        self._own: list[_Named] = []
        for part in optimizer_parts(engine.optimizer, modules, local_tensors_of(modules, groups.dp_cp)):
            name = part.local.components[0].name
            self._own.append(_Named(f"master of {name}", part.master))
            self._own += [_Named(f"{moment} of {name}", values) for moment, values in part.moments.items()]
        for group, weights in self._replicated:
            if group.size() == 1:  # no replica to compare with: these must rest too
                self._own += [_Named(f"weight {one.name}", one.tensor) for one in weights]
        self._buffers = [
            _Named(f"{i}/{name}", buffer)
            for i, module in enumerate(modules)
            for name, buffer in module.named_buffers()
            if buffer.numel() and name in saved_names[i]
        ]
        """Such as the biases of experts and the scales of low precision: the same on all ranks with the same weights. They are
        allowed to change between two updates (the health policy does that), but on all ranks alike."""
        self._replicated[0][1].extend(self._buffers)
        self._resting: list[Sums] | None = None
        self._resting_buffers: list[Sums] | None = None
        self.clean_step = 0

    def forget(self) -> None:
        """The state will be filled from elsewhere, such as a checkpoint."""
        self._resting = self._resting_buffers = None

    def remember(self) -> None:
        """After an update: remember this rank's own state."""
        self._resting = [one.sums() for one in self._own]
        self._resting_buffers = [one.sums() for one in self._buffers]

    def check(self, step: int) -> list[Finding]:
        """Before the update of `step`: compare. -> what was found, the same on every rank. Collective over the world."""
        changed = self._changed_at_rest()
        compared = [self._compare(group, weights) for group, weights in self._replicated if weights]
        mesh = self._engine.mesh
        if not mesh.any_rank(changed is not None or any(differs for differs, _ in compared)):
            self.clean_step = step - 1
            return []
        return self._explain(step, changed, compared)

    def _changed_at_rest(self) -> str | None:
        """The first tensor that changed since `remember`."""
        if self._resting is None:
            return None
        for one, before in zip(self._own, self._resting, strict=True):
            if one.sums() != before:
                return one.name
        return None

    def _changed_buffer(self) -> str | None:
        if self._resting_buffers is None:
            return None
        for one, before in zip(self._buffers, self._resting_buffers, strict=True):
            if one.sums() != before:
                return f"buffer {one.name} changed on this rank only"
        return None

    def _compare(self, group: dist.ProcessGroup, weights: list[_Named]) -> tuple[bool, list[str]]:
        """(whether replicas differ, each replica's digest). Collective over the group."""
        digest = _digest(one.sums() for one in weights)
        if group.size() == 1:
            return False, [digest]
        mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=self._engine.mesh.device)
        everyone = mine.new_empty(group.size() * mine.numel())
        dist.all_gather_into_tensor(everyone, mine, group=group)
        digests = [bytes(row).hex() for row in everyone.view(group.size(), -1).cpu().tolist()]
        return len(set(digests)) > 1, digests

    def _explain(self, step: int, changed: str | None, compared: list[tuple[bool, list[str]]]) -> list[Finding]:
        """Name the rank: by its own resting state, else by majority, else by gathering the weights from their owners again."""
        mesh = self._engine.mesh
        reports = mesh.gather_objects(changed)
        text = None
        if changed is not None:
            text = f"{changed} changed between two updates"
        elif not any(reports):
            text = self._by_majority(compared)
            if not any(mesh.gather_objects(text)):
                text = self._changed_buffer()
            if not any(mesh.gather_objects(text)):
                text = self._by_owners()
        found = mesh.gather_objects((text, host_name()))
        named = [(rank, host, why) for rank, (why, host) in enumerate(found) if why is not None]
        if not named:
            hosts = tuple(host for _, host in found)
            why = "weights differ between data-parallel ranks, and no rank can be told to be at fault"
            return [Finding(DETECTOR, "state", step, tuple(range(len(hosts))), hosts, self.clean_step, why)]
        return [Finding(DETECTOR, "state", step, (rank,), (host,), self.clean_step, why) for rank, host, why in named]

    def _by_majority(self, compared: list[tuple[bool, list[str]]]) -> str | None:
        for (group, _), (differs, digests) in zip(
            [pair for pair in self._replicated if pair[1]], compared, strict=True
        ):
            odd = odd_ones(digests)
            if differs and odd is not None and group.rank() in odd:
                return f"its weights differ from those of {len(digests) - len(odd)} other data-parallel ranks"
        return None

    def _by_owners(self) -> str | None:
        """Every weight is a function of a master on one rank. Gathered from there again, the damaged copy changes. Collective."""
        weights = [one for _, members in self._replicated for one in members]
        before = [one.sums() for one in weights]
        for part in getattr(self._engine.optimizer, "chained_optimizers", [self._engine.optimizer]):
            if not part.is_stub_optimizer:
                part._copy_main_params_to_model_params()
        after_own = [one.sums() for one in weights]
        for chunk in self._engine.chunks:
            chunk.start_param_sync(force_sync=True)
        for one, old, own, new in zip(weights, before, after_own, [one.sums() for one in weights], strict=True):
            if old != own:
                return f"weight {one.name} is not the rounded master that this rank owns"
            if own != new:
                return f"weight {one.name} differs from its owner's"
        return None


def _digest(sums: Iterable[Sums]) -> str:
    """128 bits over fingerprints."""
    return hashlib.sha256(" ".join(fingerprint.text(one) for one in sums).encode()).hexdigest()[:32]
