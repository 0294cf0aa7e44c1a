"""One turn of Algorithm 1: a layer of all tasks becomes one, as far as its units are shared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from taskzip.algebra import LayerStatistics, check_assembled
from taskzip.errors import InputError
from taskzip.graph import OUTPUT, Layer
from taskzip.planning import Quota
from taskzip.zipped import LayerRecord
from taskzip.zipping.alignment import JointInputs, align_inputs
from taskzip.zipping.assembly import install_blocks
from taskzip.zipping.common_units import CommonUnits
from taskzip.zipping.correspondence import JointLayers
from taskzip.zipping.joining import JointLayer, Pairing
from taskzip.zipping.meeting import TaskLayer
from taskzip.zipping.members import Member, Owners
from taskzip.zipping.ordering import stream_slots
from taskzip.zipping.own_scales import own_scales
from taskzip.zipping.recording import Recorder
from taskzip.zipping.resizing import restore_scales
from taskzip.zipping.settings import Settings
from taskzip.zipping.shared_rows import shared_rows
from taskzip.zipping.spaces import JointSpaces, Part, alike, of_one_kind
from taskzip.zipping.steps import compensated, observe, settle, survey, where

NONE = torch.empty(0, dtype=torch.long)
"""No columns."""


class Zipper:
    """What stays the same from layer to layer."""

    def __init__(self, members: Sequence[Member], layers: Sequence[JointLayers], settings: Settings) -> None:
        self.members = members
        self.settings = settings
        self.spaces = JointSpaces(members, layers)
        self.recorder = Recorder(members, adapt=settings.adapt)
        shares = any(self._quota(layer, parts).pairs for layer in layers if (parts := self.spaces.parts(layer)))
        streams = self.spaces.streams if shares else set()
        self.common = CommonUnits(members)
        aligned = bool(streams) and settings.cross if settings.aligned is None else settings.aligned
        self.aligned = shares and aligned
        coupled = self.spaces.twisted | (streams if settings.residual == "coupled" else set()) if shares else set()
        if coupled:
            self._couple(layers, coupled)

    def zip(self, layers: JointLayers) -> LayerRecord:
        """One turn of Algorithm 1: what the layer reads, which units pair, their merged weights, the joint layer."""
        members, settings, name = self.members, self.settings, layer_name(layers)
        inputs, parts, obstacle = self._participants(layers)
        quota = self._quota(layers, parts)
        if obstacle and quota.pairs and name in settings.plan.named():
            raise InputError(f"layer {name!r} cannot be shared ({obstacle}): leave it out of `share`.")
        before = _size(members, layers)
        sharing = set(inputs.layers) if parts and (quota.pairs or self.aligned) else set()

        statistics = {t: observe(members[t], x, settings, t in sharing) for t, x in layers.items()}
        weights = {t: compensated(members[t], x, statistics[t], settings) for t, x in layers.items()}
        joints = self._join(inputs, parts, statistics, weights, quota) if sharing else []
        scaled, relative_cost = bool(joints) and self._may_scale(inputs), 0.0
        if joints:
            aligned = [settings.cross and self._is_aligned(part) for part in parts]
            relative_cost = self.recorder.record(name, inputs, parts, joints, aligned, scaled=scaled)
        for joint in joints:
            joint.write(weights)
        scales = own_scales(members, inputs, parts, joints, statistics, weights) if scaled else {}
        rows = {t: _row_numbers(members[t], layer) for t, layer in inputs.layers.items()}
        for t, layer in layers.items():
            settle(members[t], layer, statistics[t], weights[t], settings)
        for part, joint in zip(parts, joints, strict=False):
            self._place(part, joint)
        if not settings.cross:
            self.common.write(layers, parts, joints)
        shared = sum(joint.shared_rows() for joint in joints)
        if shared:
            moved = {t: _moved(rows[t], _row_numbers(members[t], x)) for t, x in inputs.layers.items()}
            self._install(inputs, parts, joints, {t: scale[moved[t]] for t, scale in scales.items()})
        note = "" if all(layer.pinned == OUTPUT for layer in layers.values()) else obstacle
        costs = (sum(joint.cost for joint in joints), relative_cost) if shared else (0.0, 0.0)
        return self._record(layers, shared, self._groups(parts, joints), costs, before, note)

    def _install(
        self, inputs: JointInputs, parts: Sequence[Part], joints: Sequence[JointLayer], scales: Mapping[int, Tensor]
    ) -> None:
        """The merged weights, which lie in the networks, become blocks; `scales` by task, as the rows lie now."""
        groups = {t: shared_rows(t, parts, joints) for t in inputs.layers}
        merged = {t: self.members[t].dense(layer.weight) for t, layer in inputs.layers.items()}
        scales = {t: scale.to(merged[t]) for t, scale in scales.items()}
        for t, scale in scales.items():
            merged[t] = merged[t] * scale.view(-1, *(1,) * (merged[t].dim() - 1))
        install_blocks(self.members, inputs, groups, scales)
        for t, layer in inputs.layers.items():
            check_assembled(where(self.members[t], layer), merged[t], self.members[t].dense(layer.weight))
            self.members[t].changed = True

    def restore_scales(self) -> None:
        """All layers are zipped: give units the sizes back that they had before."""
        paired_anew = self.spaces.streams - self.spaces.twisted if self.settings.residual == "independent" else set()
        restore_scales(self.members, paired_anew)

    def _quota(self, layers: JointLayers, parts: Sequence[Part]) -> Quota:
        if layers.alone:
            return Quota(0)
        units = sum(part.units for part in parts) or min(layer.units for layer in layers.values())
        return self.settings.plan.quota(layer_name(layers), units)

    def _quota_of(self, layers: JointLayers, part: Part) -> Quota:
        parts = self.spaces.parts(layers)
        quotas = self._quota(layers, parts).divided([each.units for each in parts])
        return next(quota for each, quota in zip(parts, quotas, strict=True) if each.joint == part.joint)

    def _couple(self, layers: Sequence[JointLayers], coupled: Collection[int]) -> None:
        """Put the units of residual streams into one order, and every network's own in the order of slots."""
        sides = []
        for t, member in enumerate(self.members):
            own = {layer[t].name: layer[t] for layer in layers if t in layer and self.spaces.parts(layer)}
            seen = survey(member, self.settings, own)
            sides.append({name: self._side(t, x, member.weights(x), seen[name], NONE) for name, x in own.items()})
        slots = stream_slots(
            self.members,
            layers,
            self.spaces,
            coupled,
            sides,
            quota=self._quota_of,
            matching=self.settings.matching,
            seed=self.settings.seed,
        )
        for member, found in zip(self.members, slots, strict=True):
            for space, (joint, each) in found.items():
                order = member.structure.spaces[space].allowed(np.argsort(each))
                member.place(space, joint, order, each[order])

    def _participants(self, layers: JointLayers) -> tuple[JointInputs, list[Part], str]:
        """The tasks whose layers share, the inputs they share, the units that can pair; or why there are none."""
        able, cross = alike(layers), self.settings.cross
        if not cross:
            able = of_one_kind(able)
        parts = self.spaces.parts(able) if len(able) > 1 else []
        obstacle = "" if len(layers) == len(able) else self._obstacle(layers, able)
        if len(layers) == 1:
            obstacle = obstacle or "no other network has such a layer"
        elif len(able) > 1 and not parts:
            obstacle = "its units are used in different ways by the networks"
        inputs = align_inputs(self.members, able, None if cross else self.common.slots(), cross=cross)
        if parts and not inputs.segments:
            parts, obstacle = [], "no inputs in common (what it reads is not shared, or differs in size)"
        return inputs, parts, "" if parts else obstacle

    def _obstacle(self, layers: JointLayers, able: Mapping[int, Layer]) -> str:
        """Why some of the layers cannot take part."""
        for t, layer in layers.items():
            if layer.pinned:
                return f"{self.members[t].task.name}: {layer.pinned}"
        first, other = next(iter(able.values())), next(x for t, x in layers.items() if t not in able)
        if first.form == other.form:
            return "with cross=False a shared unit has one bias, and not all of the networks have one here"
        return f"a {first.form} and a {other.form} have no weights in common"

    def _side(
        self,
        task: int,
        layer: Layer,
        weights: Tensor,
        statistics: LayerStatistics,
        private: Tensor,
        *,
        normed: bool = True,
        scaled: bool = False,
        cross: bool = True,
    ) -> TaskLayer:
        """A task's layer, free of its units' scale where batch-norm follows, if that is wanted, or one of its own."""
        answered = len(statistics.square) > 0  # a survey does not sum up answers, which are those of these weights
        _, variance = statistics.answer_moments() if answered else statistics.moments(weights)
        scale = torch.from_numpy(self.members[task].sizes(layer)).to(variance) if scaled else None
        if layer.batch_norm and normed:
            scale = self.members[task].batch_norm_scale(layer)
        if scale is not None:
            weights, variance = weights / scale[:, None], variance / scale.square()
        samples, balance = self.members[task].samples, self.settings.balance[task]
        if self.settings.relative and variance.any():
            balance = balance / float(variance.mean())
        damping, private = self.settings.damping, private.to(weights.device)
        pruned = layer.name in self.members[task].pruned
        centred = bool(layer.batch_norm) or (scaled and layer.bias is not None)
        return TaskLayer(task, layer, weights, statistics, samples, balance, damping, centred, private, cross, pruned)

    def _join(
        self,
        inputs: JointInputs,
        parts: Sequence[Part],
        statistics: Mapping[int, LayerStatistics | None],
        weights: Mapping[int, Tensor],
        quota: Quota,
    ) -> list[JointLayer]:
        """Lines 5 to 7 of Algorithm 1, one task after another, for the units of each joint space by themselves."""
        normed, scaled = all(layer.batch_norm for layer in inputs.layers.values()), self._may_scale(inputs)
        adapt, cross = self.settings.adapt and inputs.cross, inputs.cross
        sides = {
            t: self._side(
                t, layer, weights[t], s, inputs.private(t) if adapt else NONE, normed=normed, scaled=scaled, cross=cross
            )
            for t, layer in inputs.layers.items()
            if (s := statistics[t]) is not None
        }
        joints = []
        for part, each in zip(parts, quota.divided([part.units for part in parts]), strict=True):
            placed = all(space in self.members[t].slots for t, space in part.spaces.items())
            own = placed and self.settings.residual == "independent" and part.joint not in self.spaces.twisted
            given = (
                {t: self.members[t].slots[space][1] for t, space in part.spaces.items()} if placed and not own else None
            )
            how, aligned = self.settings, self._is_aligned(part) and not own
            importance = self._importance(inputs, part, scaled or normed)
            pairing = Pairing(part.quotas(each), how.matching, how.seed, aligned, how.connections, importance)
            common = None if inputs.cross else self.common.of(part)
            joint = JointLayer(sides, inputs, part.rows, pairing, given, common, self.spaces.wholes(part.joint))
            if self.settings.spread and not scaled:
                joint.match_spread()
            joints.append(joint)
        return joints

    def _importance(self, inputs: JointInputs, part: Part, relative: bool) -> dict[int, np.ndarray]:
        """How much errors of units count, by task; errors as they are, or `relative` to the sizes of their rows."""
        found = {}
        for t, space in part.spaces.items():
            member = self.members[t]
            if space in member.known.matters:
                sizes = member.sizes(inputs.layers[t])[part.rows[t]]
                found[t] = member.known.matters[space] * ((sizes**2).mean(1) ** 0.5 if relative else 1.0)
        return found

    def _may_scale(self, inputs: JointInputs) -> bool:
        """Whether every task gets a scale of its own for each shared unit: where no batch-norm is one already."""
        return self.settings.own_scale and all(self.members[t].may_scale(layer) for t, layer in inputs.layers.items())

    def _is_aligned(self, part: Part) -> bool:
        return self.aligned or part.joint in self.spaces.streams

    def _place(self, part: Part, joint: JointLayer) -> None:
        """Put units into the order of the joint layer, most owners first, if no layer before has put them into one."""
        if not (joint.shared_rows() or self._is_aligned(part)):
            return
        for t, space in part.spaces.items():
            if space not in self.members[t].slots:
                groups = sorted(joint.units_of(t).items(), key=lambda group: (-len(group[0]), group[0]))
                order = torch.cat([units for _, units in groups]).cpu().numpy()
                order = self.members[t].structure.spaces[space].allowed(order)
                self.members[t].place(space, part.joint, order, joint.slots[t][order])
                joint.reorder(t, order)

    def _groups(self, parts: Sequence[Part], joints: Sequence[JointLayer]) -> dict[tuple[str, ...], int]:
        """How many rows which tasks share, most tasks first."""
        found: dict[Owners, int] = {}
        for part, joint in zip(parts, joints, strict=False):
            for owners, group in joint.groups.items():
                if len(owners) > 1:
                    height = part.rows[owners[0]].shape[1]
                    found[owners] = found.get(owners, 0) + len(group.units) * height
        members = {owners: sorted((self.members[t] for t in owners), key=lambda m: m.number) for owners in found}
        ranked = sorted(found, key=lambda owners: (-len(owners), [m.number for m in members[owners]]))
        return {tuple(m.task.name for m in members[owners]): found[owners] for owners in ranked}

    def _record(
        self,
        layers: JointLayers,
        shared: int,
        groups: Mapping[tuple[str, ...], int],
        costs: tuple[float, float],
        before: int,
        note: str,
    ) -> LayerRecord:
        """What happened to one layer, tasks as the caller gave them; what a task does not have is ""."""
        tasks = sorted(range(len(self.members)), key=lambda t: self.members[t].number)
        names = tuple(layers[t].name if t in layers else "" for t in tasks)
        units = tuple(layers[t].units if t in layers else 0 for t in tasks)
        (cost, relative), after = costs, _size(self.members, layers)
        return LayerRecord(
            layers.name, names, units, shared, cost, before, after, note, relative, tuple(groups.items())
        )


def layer_name(layers: JointLayers) -> str:
    """What a joint layer is called: as the first of the caller's networks that has it calls it."""
    return layers.name


def _row_numbers(member: Member, layer: Layer) -> np.ndarray:
    """Which of the original network's rows each row of a layer is."""
    rows = member.original_rows(layer)
    return np.arange(layer.units) if rows is None else rows.numpy()


def _moved(before: np.ndarray, after: np.ndarray) -> Tensor:
    """Where each row stood before."""
    return torch.from_numpy(np.argsort(before)[after])


def _size(members: Sequence[Member], layers: JointLayers) -> int:
    """Parameters of a layer in all networks, shared ones counted once."""
    return sum(p.numel() for p in {p for t, x in layers.items() for p in members[t].parameters(x)})
