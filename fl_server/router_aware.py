"""Router-aware FedAvg as a Flower strategy.

    theta_e += s_e sum_k p_ke delta_ke    for semantic and adaptive experts, weights from `fl_server.weights`
    theta   += sum_k n_k / N delta_k      for everything else

With ``usage_exponent = 0``, no floor, no cap, no gate and no shrinkage this is FedAvg (McMahan et al., arXiv
1602.05629). Each site MUST send its trained tensors minus the round's global tensors under "update", and under
"numbers" its size n_k and, per expert, the share u_ke of gate mass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_server.replies import PIECE, Form, InReply, Update, is_finite, mean_loss, only_finite, parse_replies
from fl_server.round_strategy import RoundReport, State, Tensors, record_of
from fl_server.scores import mean_score, score_of
from fl_server.weights import balance_step, expert_weights, plain_share
from icmoe.kinds import BALANCE_BIAS, weighing_expert
from icmoe.messages import ARRAYS, CONFIG, DICE_KEY, LOSS_KEY, PATIENTS_KEY, ROUND_KEY, STUDY_KEY
from icmoe.study import Aggregation, Study

Weight = npt.NDArray[np.float32]
"""A number as an array without axes, which NumPy multiplies by faster than by a scalar."""
AT_ONCE = 16
"""Updates at most whose arrays are objects at once: those of a hundred take more memory than the model."""


class RouterAware(Strategy):
    """Weigh each expert's updates by how much each site's router used it.

    Parameters
    ----------
    study
        The study; its `aggregation` and `model` decide.
    sites
        Names of the participating sites by node.
    sizes
        Announced sizes n_k, so that the largest site is asked first and no core idles at the end of a round.
    settings
        Weights in place of the study's own, for a wrapper that hands in one aggregate, which is float32.
    """

    def __init__(
        self,
        study: Study,
        sites: Mapping[int, str],
        sizes: Mapping[str, int] | None = None,
        settings: Aggregation | None = None,
    ) -> None:
        self.study = study
        self.settings = study.aggregation if settings is None else settings
        self._form: Form = study.update.form if settings is None else "float32"
        self.sites = sites
        self.sizes = {} if sizes is None else sizes
        self._current: Tensors = {}
        self._moving: Tensors = {}  # room for the sums; memory of the round before need not be cleared by the kernel again
        self.report = RoundReport()

    def summary(self) -> None:
        """Print nothing: the caller shows the study."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Return one training message per site; it carries study digest, round and tensors, nothing else."""
        del grid
        self._current = {name: array.numpy() for name, array in arrays.items()}
        if list(map(_form, self._moving.items())) != list(map(_form, self._current.items())):
            self._moving = {name: np.empty_like(tensor) for name, tensor in self._current.items()}
        return self._messages(server_round, arrays, config, MessageType.TRAIN)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Return one evaluation message per site."""
        del grid
        return self._messages(server_round, arrays, config, MessageType.EVALUATE)

    def _messages(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, kind: str) -> list[Message]:
        config[STUDY_KEY], config[ROUND_KEY] = self.study.digest, server_round
        content = RecordDict({ARRAYS: arrays, CONFIG: config})
        order = sorted(self.sites, key=lambda node: (-self.sizes.get(self.sites[node], 0), self.sites[node]))
        return [Message(content, dst_node_id=node, message_type=kind) for node in order]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new global arrays, or None without any update: the model does not move then."""
        del server_round
        self.report = RoundReport()
        updates, faults = parse_replies(replies, self.sites, self.study, self._current, self._form, values=False)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity stay in a sum, so one look at it is enough
            moved = self._moved(updates) if updates else {}
            if not all(map(is_finite, moved.values())):
                updates, odd = only_finite(updates)
                faults += odd
                moved = self._moved(updates) if updates else {}
        self.report.updates, self.report.faults = [update.without_tensors() for update in updates], faults
        if not updates:
            return None, None
        metrics = MetricRecord() if (loss := mean_loss(updates)) is None else MetricRecord({LOSS_KEY: loss})
        return record_of(moved), metrics

    def _moved(self, updates: Sequence[Update]) -> Tensors:
        """Return the global tensors after the round; at least one update."""
        size_S = np.array([update.size for update in updates], dtype=np.float64)
        usage_SM = np.array([update.usage_M for update in updates], dtype=np.float64)
        if self.study.model.experts:
            self.report.weights = expert_weights(size_S, usage_SM, self.settings)
        before, moved = self._current, dict(self._moving)
        weights, weighed_by = self._weights(size_S), {name: self._weighed_by(name) for name in moved}
        for group in together(updates):  # in site order
            read = [(index, dict(updates[index].tensors.items())) for index in group]
            for name, tensor in moved.items():
                weight_S = weights[weighed_by[name]]
                add(before[name], [(weight_S[index], sent[name]) for index, sent in read if name in sent], tensor)
            before = moved
        if BALANCE_BIAS in moved and self.settings.balance_step > 0.0:
            bias_M = moved[BALANCE_BIAS].astype(np.float64)
            moved[BALANCE_BIAS] = balance_step(bias_M, size_S, usage_SM, self.settings.balance_step).astype(np.float32)
        return moved

    def state(self) -> State:
        """Return nothing: each round stands for itself."""
        return {}

    def load_state(self, state: State) -> None:
        """Take nothing back."""
        del state

    def unmoved(self) -> ArrayRecord:
        """Return the round's arrays as they were sent out."""
        return record_of(self._current)

    def _weights(self, size_S: npt.NDArray[np.float64]) -> dict[int | None, list[Weight]]:
        """Return step times share of each site, by the expert whose use weighs it, and under None by size alone."""
        found: dict[int | None, list[Weight]] = {None: [_weight(share) for share in plain_share(size_S)]}
        if (weights := self.report.weights) is not None:
            for expert, (step, share_S) in enumerate(zip(weights.step_M, weights.share_SM.T, strict=True)):
                found[expert] = [_weight(step * share) for share in share_S]
        return found

    def _weighed_by(self, name: str) -> int | None:
        """Return the expert whose use weighs a tensor, None where size alone does."""
        return None if self.report.weights is None else weighing_expert(name, self.study.model)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the validation Dice over the patients of all sites, None where no site has any."""
        del server_round
        scored = [score for reply in replies if (score := score_of(reply)) is not None]
        if (dice := mean_score(scored)) is None:
            return None
        return MetricRecord({DICE_KEY: dice, PATIENTS_KEY: sum(count for _, count in scored)})


def combine(
    tensor: npt.NDArray[np.float32],
    deltas: list[npt.NDArray[np.float32] | None],
    share_S: npt.NDArray[np.float64],
    step: float,
) -> npt.NDArray[np.float32]:
    """Return ``tensor + step * sum_k share_k delta_k`` in float32, added in the order given.

    Parameters
    ----------
    tensor
        Global tensor of the round.
    deltas
        Of each site in site order; None where a tensor stays at the sites, which leaves it as it is.
    share_S
        Weights.
    step
        s in [0, 1].
    """
    moved = np.empty_like(tensor)
    shares = [_weight(step * share) for share in share_S]
    add(tensor, [(share, delta) for share, delta in zip(shares, deltas, strict=True) if delta is not None], moved)
    return moved


def _form(item: tuple[str, npt.NDArray[np.float32]]) -> tuple[str, tuple[int, ...]]:
    return item[0], item[1].shape


def _weight(value: float) -> Weight:
    return np.asarray(value, dtype=np.float32)


def add(
    tensor: npt.NDArray[np.float32],
    parts: Sequence[tuple[Weight, npt.NDArray[np.float32]]],
    moved: npt.NDArray[np.float32],
) -> None:
    """Write the tensor plus the sum of ``weight * delta``, added in the order given, to `moved`, which may be the tensor.

    All parts of one piece before the next piece, so that the sum stays in the processor's cache.
    """
    if not parts:
        np.copyto(moved, tensor)
    elif moved.size <= PIECE:
        product = np.empty_like(moved)
        for weight, delta in parts:
            np.add(tensor, np.multiply(delta, weight, product), moved)
            tensor = moved
    else:
        tensor_N, moved_N, parts_N = tensor.reshape(-1), moved.reshape(-1), [(weight, part.reshape(-1)) for weight, part in parts]
        for start in range(0, moved.size, PIECE):
            piece = slice(start, start + PIECE)
            add(tensor_N[piece], [(weight, part_N[piece]) for weight, part_N in parts_N], moved_N[piece])


def together(updates: Sequence[Update]) -> Iterator[list[int]]:
    """Yield the indices of updates that are added together: some where reading them copies nothing, else each by itself.

    So no two copies of an update are in memory at once.
    """
    group: list[int] = []
    for index, update in enumerate(updates):
        view = isinstance(update.tensors, InReply) and update.tensors.is_view
        if group and (not view or len(group) == AT_ONCE):
            yield group
            group = []
        group.append(index)
        if not view:
            yield group
            group = []
    if group:
        yield group
