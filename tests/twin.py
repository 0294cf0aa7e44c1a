"""A slow, literal twin of `taskzip.zip` in float64 NumPy, against which the fast one is checked.

It is written from the equations of the paper (eq. 7 to 12, Algorithm 1) and of design 2.5, and imports nothing of
taskzip. Two networks, each an `nn.Sequential` of Linear, Conv2d (stride, padding), ReLU, MaxPool2d and Flatten, whose
weights are copied out once; everything after that is NumPy.

Every layer is a matrix here, [units, inputs * taps + 1], with the bias as the last column (0 where there is none).
The columns lie input by input, so those that read unit j of the previous layer are a run of equal length for every j:
the k * k taps of a kernel, the H * W pixels behind a flatten, or one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn


@dataclass
class Layer:
    """One Linear or Conv2d as a matrix."""

    matrix: np.ndarray
    bias: bool
    kernel: tuple[int, int] | None = None
    stride: int = 1
    padding: int = 0

    @property
    def units(self) -> int:
        return len(self.matrix)

    @property
    def columns(self) -> int:
        return self.matrix.shape[1] - 1


@dataclass
class Turn:
    """What happened to one hidden layer: d for all pairs, the pairs, and their summed d."""

    difference: np.ndarray
    pairs: list[tuple[int, int]]

    @property
    def cost(self) -> float:
        return float(sum(self.difference[i, j] for i, j in self.pairs))


@dataclass
class Result:
    """The zipped networks, and one record per hidden layer."""

    networks: list[Network]
    turns: list[Turn] = field(default_factory=list)

    def __call__(self, task: int, x: np.ndarray) -> np.ndarray:
        """The output of one task."""
        return self.networks[task].run(x)


# --- a network and its forward pass -------------------------------------------------------------------------------


class Network:
    """Steps of a Sequential; a weight layer is `("layer", number)`."""

    def __init__(self, steps: list[tuple], layers: list[Layer]) -> None:
        self.steps = steps
        self.layers = layers

    @classmethod
    def of(cls, model: nn.Sequential) -> Network:
        steps: list[tuple] = []
        layers: list[Layer] = []
        for module in model:
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                weight = module.weight.detach().double().numpy()
                bias = np.zeros(len(weight)) if module.bias is None else module.bias.detach().double().numpy()
                layer = Layer(np.column_stack([weight.reshape(len(weight), -1), bias]), module.bias is not None)
                if isinstance(module, nn.Conv2d):
                    layer.kernel = module.kernel_size
                    layer.stride, layer.padding = module.stride[0], module.padding[0]
                steps.append(("layer", len(layers)))
                layers.append(layer)
            elif isinstance(module, nn.ReLU):
                steps.append(("relu",))
            elif isinstance(module, nn.MaxPool2d):
                steps.append(("pool", module.kernel_size, module.stride))
            elif isinstance(module, nn.Flatten):
                steps.append(("flatten",))
            else:
                raise TypeError(f"the twin does not know {module}")
        return cls(steps, layers)

    def copy(self) -> Network:
        layers = [Layer(x.matrix.copy(), x.bias, x.kernel, x.stride, x.padding) for x in self.layers]
        return Network(self.steps, layers)

    def run(self, x: np.ndarray) -> np.ndarray:
        """The output of the network."""
        for step in self.steps:
            x = self._step(step, x)
        return x

    def rows(self, number: int, x: np.ndarray) -> np.ndarray:
        """What weight layer `number` reads: one row per sample and output position, each with a last 1."""
        for step in self.steps:
            if step == ("layer", number):
                patches, _ = _patches(self.layers[number], x)
                return patches
            x = self._step(step, x)
        raise IndexError(number)

    def _step(self, step: tuple, x: np.ndarray) -> np.ndarray:
        if step[0] == "layer":
            layer = self.layers[step[1]]
            patches, shape = _patches(layer, x)
            z = patches @ layer.matrix.T
            return z if shape is None else z.reshape(*shape, layer.units).transpose(0, 3, 1, 2)
        if step[0] == "relu":
            return np.maximum(x, 0.0)
        if step[0] == "flatten":
            return x.reshape(len(x), -1)
        _, size, stride = step
        samples, channels, height, width = x.shape
        out = np.empty((samples, channels, (height - size) // stride + 1, (width - size) // stride + 1))
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                window = x[:, :, i * stride : i * stride + size, j * stride : j * stride + size]
                out[:, :, i, j] = window.max(axis=(2, 3))
        return out


def _patches(layer: Layer, x: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int] | None]:
    """Rows that a layer reads, and for a convolution how they lie: (samples, height, width)."""
    if layer.kernel is None:
        return np.column_stack([x, np.ones(len(x))]), None
    p, s = layer.padding, layer.stride
    x = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
    tall, wide = layer.kernel
    height, width = (x.shape[2] - tall) // s + 1, (x.shape[3] - wide) // s + 1
    rows = []
    for sample in x:
        for i in range(height):
            for j in range(width):
                patch = sample[:, i * s : i * s + tall, j * s : j * s + wide]
                rows.append(np.append(patch.ravel(), 1.0))
    return np.array(rows), (len(x), height, width)


# --- Algorithm 1 --------------------------------------------------------------------------------------------------


def zip_twin(
    models: Sequence[nn.Sequential],
    data: Sequence[np.ndarray],
    *,
    share: float,
    matching: str,
    compensate: bool,
    balance: float = 0.5,
    damping: float = 1e-2,
    ridge: float = 0.1,
    threshold: float | None = None,
    cross: bool = True,
) -> Result:
    """Zip two networks.

    Args:
        models: the networks of task A and task B.
        data: per task, all its samples.
        share: the fraction of the smaller layer's units that is shared.
        matching: "greedy" or "optimal" (exact; exponential in the number of units).
        compensate: units are first given equal sizes, and errors count relative to them; least squares
            before merging, after it for every task the scale and shift that fit a unit best (without `cross` those
            of both that match its spread), and private weights that follow. Of a pair, the error of the unit that
            matters more to what reads it counts more.
        balance: alpha of task A.
        damping, ridge: as in `taskzip.zip`.
        threshold: with "greedy": stop at the first pair whose d is above it.
        cross: whether shared units keep weights from private ones; without, both networks have biases everywhere.
    """
    original = [Network.of(model) for model in models]
    known: Sequence[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []), ([], [])]
    if compensate:
        variances = [x.var((0, *range(2, x.ndim))) for x in data]  # of each channel
        if len({len(each) for each in variances}) == 1:
            variances = [(variances[0] + variances[1]) / 2] * 2
        known = [_equalise(network, np.sqrt(each)) for network, each in zip(original, variances, strict=True)]
    matters = [each for each, _ in known]
    result = Result([network.copy() for network in original])
    zipped = result.networks
    alphas = (balance, 1 - balance)
    shared_before: int | None = None  # units of the previous layer that are shared; None for the networks' inputs
    changed = False
    for number in range(len(original[0].layers)):
        x = [zipped[t].rows(number, data[t]) for t in (0, 1)]
        z = [original[t].rows(number, data[t]) @ original[t].layers[number].matrix.T for t in (0, 1)]
        layers = [zipped[t].layers[number] for t in (0, 1)]
        counts = functools.partial(_counts, [each[number : number + 1] for each in matters])
        alpha = [a / each.var(0).mean() if compensate else a for a, each in zip(alphas, z, strict=True)]
        if compensate and changed:
            for t in (0, 1):
                layers[t].matrix = _least_squares(x[t], z[t], layers[t], ridge)
        if number == len(original[0].layers) - 1:
            if compensate:
                _restore(zipped, [turn.pairs for turn in result.turns], [scales for _, scales in known])
            return result

        shared = _shared_columns(zipped, number, shared_before)
        bias = all(layer.bias for layer in layers)
        if not cross:
            h = []
            for t in (0, 1):
                curvature = alpha[t] / len(data[t]) * sum(np.outer(row, row) for row in x[t])
                h.append(curvature + damping * np.mean(np.diag(curvature)) * np.eye(len(curvature)))
            columns = [np.append(s, -1) for s in shared]
            matrices = [layer.matrix for layer in layers]
            d, _ = _cut_pairs(matrices, h, columns, lambda i, j: (1.0, 1.0))
            _, merged = _cut_pairs(matrices, h, columns, counts)
            weighted = d * np.outer(matters[0][number], matters[1][number]) if compensate else d
            pairs = {"greedy": _greedy, "optimal": _optimal}[matching](
                weighted, round(share * min(layers[0].units, layers[1].units))
            )
            pairs.sort()
            result.turns.append(Turn(d, pairs))
            for i, j in pairs:
                for t, unit in ((0, i), (1, j)):
                    layers[t].matrix[unit] = merged[i, j][t]
                if compensate:
                    _match_spread(layers, (i, j), x, z, alpha, bias)
            _arrange(zipped, number, pairs)
            shared_before, changed = len(pairs), True
            continue
        w = [_restricted(layers[t].matrix, shared[t], bias) for t in (0, 1)]
        own = [_own_columns(layers[t], shared[t], bias) if compensate else np.arange(0) for t in (0, 1)]
        h, whole = [], []
        for t in (0, 1):
            rows = np.column_stack([_restricted(x[t], shared[t], bias), x[t][:, own[t]]])
            if compensate and layers[t].bias:
                rows = rows - rows.mean(0)  # every task has a shift of its own
            curvature = alpha[t] / len(data[t]) * sum(np.outer(row, row) for row in rows)
            whole.append(curvature + damping * np.mean(np.diag(curvature)) * np.eye(len(curvature)))
            # What is left of the error where the own weights are free: the inverse of a part of the inverse.
            common = w[t].shape[1]
            h.append(np.linalg.inv(np.linalg.inv(whole[t])[:common, :common]))

        d = _differences(w, h, bias)
        count = round(share * min(layers[0].units, layers[1].units))
        weighted = d * np.outer(matters[0][number], matters[1][number]) if compensate else d
        pairs = {"greedy": _greedy, "optimal": _optimal}[matching](weighted, count)
        if threshold is not None:
            pairs = [(i, j) for i, j in pairs if d[i, j] <= threshold]
        pairs.sort()
        result.turns.append(Turn(d, pairs))

        for i, j in pairs:
            merged = _merged(w[0][i], w[1][j], [c * each for c, each in zip(counts(i, j), h, strict=True)], bias)
            for t, unit in ((0, i), (1, j)):
                before = w[t][unit]
                _put(layers[t].matrix, unit, shared[t], merged, bias)
                change = _restricted(layers[t].matrix[[unit]], shared[t], bias)[0] - before
                at = len(change)
                layers[t].matrix[unit, own[t]] -= np.linalg.inv(whole[t][at:, at:]) @ whole[t][at:, :at] @ change
                if compensate:
                    _own_scale(layers[t], unit, x[t], z[t][:, unit])
        _arrange(zipped, number, pairs)
        shared_before = len(pairs)
        changed = changed or len(pairs) > 0
    raise AssertionError("a network without layers")


def _equalise(network: Network, spread: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Scale hidden units to size 1: ReLU and pooling commute with it, the next layer's weights are divided by it.

    A unit's size is the norm of its weights, without the bias, times the sizes of what they read, which are spreads
    for the inputs of the network. Returns per layer how much each unit matters, its part of the squared sizes of the
    units that read it, and how many times as large it was made.
    """
    layers = network.layers
    first = layers[0].matrix[:, :-1]
    taps = int(np.prod(layers[0].kernel or ()))
    sizes = [np.linalg.norm(first * spread.repeat(taps), axis=1)]
    for number, (layer, reader) in enumerate(itertools.pairwise(layers)):
        layer.matrix /= sizes[number][:, None]
        reader.matrix[:, :-1] *= sizes[number].repeat(reader.columns // layer.units)
        sizes.append(np.linalg.norm(reader.matrix[:, :-1], axis=1))
    importance = []
    for layer, reader in itertools.pairwise(layers):
        run = reader.columns // layer.units
        squares = reader.matrix[:, :-1] ** 2
        if reader is not layers[-1]:
            squares = squares / squares.sum(1, keepdims=True)
        read = np.array([squares[:, k * run : (k + 1) * run].sum() for k in range(layer.units)])
        importance.append(np.sqrt(read / read.mean()))
    return importance, [1 / size for size in sizes[:-1]]


def _restore(networks: Sequence[Network], pairs: Sequence[Sequence[tuple[int, int]]], scales: Sequence[list]) -> None:
    """Scale units back to the sizes that they had; those of a pair, which come first, to their geometric mean."""
    for number, found in enumerate(pairs):
        size = [np.log(each[number][_paired_first(each[number], found, t)]) for t, each in enumerate(scales)]
        size[0][: len(found)] = size[1][: len(found)] = (size[0][: len(found)] + size[1][: len(found)]) / 2
        for network, each in zip(networks, size, strict=True):
            layer, reader = network.layers[number], network.layers[number + 1]
            layer.matrix = layer.matrix * np.exp(-each)[:, None]
            reader.matrix[:, :-1] *= np.exp(each).repeat(reader.columns // layer.units)


def _least_squares(x: np.ndarray, z: np.ndarray, layer: Layer, ridge: float) -> np.ndarray:
    """argmin sum |W x - z|^2 + ridge * |(W - W_now) diag(G)^1/2|^2, as one least-squares problem with more rows."""
    d = x.shape[1] if layer.bias else x.shape[1] - 1
    x = x[:, :d]
    pull = np.diag(np.sqrt(ridge * _mean_squares(x.T @ x)))
    now = layer.matrix[:, :d]
    solution, *_ = np.linalg.lstsq(np.vstack([x, pull]), np.vstack([z, pull @ now.T]), rcond=None)
    return np.column_stack([solution.T, layer.matrix[:, d:]])


def _mean_squares(curvature: np.ndarray) -> np.ndarray:
    """Of each input; one that is rarely on has a hundredth of the mean."""
    return np.maximum(np.diag(curvature), 1e-2 * np.mean(np.diag(curvature)))


def _shared_columns(networks: Sequence[Network], number: int, shared_before: int | None) -> list[np.ndarray]:
    """Per task, the columns from shared inputs, without the bias."""
    found = []
    for network in networks:
        layer = network.layers[number]
        if shared_before is None:
            found.append(np.arange(layer.columns))
        else:
            run = layer.columns // network.layers[number - 1].units
            found.append(np.arange(shared_before * run))
    return found


def _own_columns(layer: Layer, shared: np.ndarray, bias: bool) -> np.ndarray:
    """The columns that no other task has, the bias among them where the other has none."""
    return np.setdiff1d(np.arange(layer.columns + (layer.bias and not bias)), shared)


def _restricted(matrix: np.ndarray, columns: np.ndarray, bias: bool) -> np.ndarray:
    return np.column_stack([matrix[:, columns], matrix[:, -1]]) if bias else matrix[:, columns]


def _common(sizes: Sequence[int], bias: bool) -> list[np.ndarray]:
    """Where the columns of each task lie in the larger task's, the bias being last in both."""
    return [np.append(np.arange(size - 1), max(sizes) - 1) if bias else np.arange(size) for size in sizes]


def _differences(w: Sequence[np.ndarray], h: Sequence[np.ndarray], bias: bool) -> np.ndarray:
    """Eq. 12 for every pair: 1/2 (wA - wB)^T (HA^-1 + HB^-1)^-1 (wA - wB).

    Fictive connections of the task with fewer inputs have curvature 0, so an infinite H^-1: nothing is lost along them,
    and (HA^-1 + HB^-1)^-1 is that of the other inputs alone, with zeros around it.
    """
    at = _common([len(each) for each in h], bias)
    real = np.intersect1d(*at)
    inverses = [np.linalg.inv(h[t])[np.ix_(np.isin(at[t], real), np.isin(at[t], real))] for t in (0, 1)]
    metric = np.linalg.inv(inverses[0] + inverses[1])
    d = np.empty((len(w[0]), len(w[1])))
    for i in range(len(w[0])):
        for j in range(len(w[1])):
            apart = w[0][i][np.isin(at[0], real)] - w[1][j][np.isin(at[1], real)]
            d[i, j] = 0.5 * apart @ metric @ apart
    return d


def _greedy(d: np.ndarray, count: int) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        free = [
            (d[i, j], i, j)
            for i in range(d.shape[0])
            for j in range(d.shape[1])
            if i not in {a for a, _ in pairs} and j not in {b for _, b in pairs}
        ]
        _, i, j = min(free)
        pairs.append((i, j))
    return pairs


def _optimal(d: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The cheapest `count` pairs, by dynamic programming over the set of B's units that are taken."""
    best: dict[int, tuple[float, list[tuple[int, int]]]] = {0: (0.0, [])}
    for i in range(d.shape[0]):
        after = dict(best)  # unit i stays alone
        for taken, (cost, pairs) in best.items():
            for j in range(d.shape[1]):
                if len(pairs) < count and not taken >> j & 1:
                    candidate = cost + d[i, j], [*pairs, (i, j)]
                    if candidate[0] < after.get(taken | 1 << j, (np.inf,))[0]:
                        after[taken | 1 << j] = candidate
        best = after
    return min((c for c in best.values() if len(c[1]) == count), key=lambda c: c[0])[1]


def _merged(w_a: np.ndarray, w_b: np.ndarray, h: Sequence[np.ndarray], bias: bool) -> np.ndarray:
    """Eq. 10 and 11: (HA + HB)^-1 (HA wA + HB wB) over the inputs of the larger task; 0 where one has none."""
    at = _common([len(each) for each in h], bias)
    size = max(len(each) for each in h)
    total, wanted = np.zeros((size, size)), np.zeros(size)
    for t, w in enumerate((w_a, w_b)):
        total[np.ix_(at[t], at[t])] += h[t]
        wanted[at[t]] += h[t] @ w
    return np.linalg.inv(total) @ wanted


def _counts(matters: Sequence[Sequence[np.ndarray]], i: int, j: int) -> tuple[float, float]:
    """How much the errors of two paired units count: the squares of how much they matter, to powers of two.

    None counts less than 2^-10 of the other.
    """
    if not matters[0]:
        return 1.0, 1.0
    power = round(2 * np.log2(matters[0][0][i] / matters[1][0][j]))
    return 2.0 ** max(-10, min(power, 0)), 2.0 ** max(-10, -max(power, 0))


def _cut_pairs(
    w: Sequence[np.ndarray],
    h: Sequence[np.ndarray],
    columns: Sequence[np.ndarray],
    counts: Callable[[int, int], Sequence[float]],
) -> tuple[np.ndarray, dict[tuple[int, int], list[np.ndarray]]]:
    """For every pair, the one set of weights over shared columns that raises both errors least, and by how much.

    w = (sum H_ss)^-1 (sum H_s: w_t), all other columns 0, each H times how much the error counts. Shared columns that
    one task lacks (of a smaller input) are curvature 0 to it.
    """
    at = _common([len(each) for each in columns], bias=True)
    size = max(len(each) for each in columns)
    d, merged = np.empty((len(w[0]), len(w[1]))), {}
    for i in range(len(w[0])):
        for j in range(len(w[1])):
            total, wanted = np.zeros((size, size)), np.zeros(size)
            for t, unit in ((0, i), (1, j)):
                total[np.ix_(at[t], at[t])] += counts(i, j)[t] * h[t][np.ix_(columns[t], columns[t])]
                wanted[at[t]] += counts(i, j)[t] * h[t][columns[t]] @ w[t][unit]
            found = np.linalg.inv(total) @ wanted
            merged[i, j], d[i, j] = [], 0.0
            for t, unit in ((0, i), (1, j)):
                whole = np.zeros(w[t].shape[1])
                whole[columns[t]] = found[at[t]]
                merged[i, j].append(whole)
                apart = w[t][unit] - whole
                d[i, j] += 0.5 * apart @ h[t] @ apart
    return d, merged


def _arrange(networks: Sequence[Network], number: int, pairs: Sequence[tuple[int, int]]) -> None:
    """Put the paired units first."""
    for t in (0, 1):
        _reorder(networks[t], number, _paired_first(range(networks[t].layers[number].units), pairs, t))


def _paired_first(units: Sequence, pairs: Sequence[tuple[int, int]], task: int) -> list[int]:
    first = [pair[task] for pair in pairs]
    return first + [unit for unit in range(len(units)) if unit not in first]


def _put(matrix: np.ndarray, unit: int, columns: np.ndarray, merged: np.ndarray, bias: bool) -> None:
    matrix[unit, columns] = merged[: len(columns)]
    if bias:
        matrix[unit, -1] = merged[-1]


def _own_scale(layer: Layer, unit: int, x: np.ndarray, z: np.ndarray) -> None:
    """Scale and shift a unit so that it comes closest to its original answers; without a bias there is no shift."""
    y = x @ layer.matrix[unit]
    shifted = np.column_stack([y, np.ones(len(y))]) if layer.bias else y[:, None]
    scale = np.linalg.lstsq(shifted, z, rcond=None)[0][0].clip(0.1, 10.0) if y.var() > 1e-6 * np.mean(y**2) else 1.0
    layer.matrix[unit] *= scale
    if layer.bias:
        layer.matrix[unit, -1] += (z - scale * y).mean()


def _match_spread(
    layers: Sequence[Layer],
    units: Sequence[int],
    x: Sequence[np.ndarray],
    z: Sequence[np.ndarray],
    alpha: Sequence[float],
    bias: bool,
) -> None:
    """One scale and one shift per pair, so that variance and mean, averaged over the tasks, are the original ones."""
    y = [x[t] @ layers[t].matrix[units[t]] for t in (0, 1)]
    wanted = [z[t][:, units[t]] for t in (0, 1)]
    alpha = [a / sum(alpha) for a in alpha]
    scale = np.sqrt(
        sum(a * each.var() for a, each in zip(alpha, wanted, strict=True))
        / sum(a * each.var() for a, each in zip(alpha, y, strict=True))
    ).clip(0.5, 2.0)
    shift = sum(alpha[t] * (wanted[t].mean() - scale * y[t].mean()) for t in (0, 1))
    for t in (0, 1):
        layers[t].matrix[units[t]] *= scale
        if bias:
            layers[t].matrix[units[t], -1] += shift


def _reorder(network: Network, number: int, order: Sequence[int]) -> None:
    """Put units into this order: rows of their layer, columns of the layer that reads them."""
    layer, reader = network.layers[number], network.layers[number + 1]
    layer.matrix = layer.matrix[list(order)]
    run = reader.columns // layer.units
    columns = [unit * run + k for unit in order for k in range(run)]
    reader.matrix = np.column_stack([reader.matrix[:, columns], reader.matrix[:, -1]])
