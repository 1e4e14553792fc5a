"""Contrastive representation distillation, with a memory of all examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.distill._logits import check_positive, kept
from jaxcompress.distill._paired import (
    check_finite,
    check_where,
    products,
    unit,
    widened,
)


class ContrastiveMemory(NamedTuple):
    """State of `Contrastive`: embeddings of every example of the training set.

    Attributes:
      student: ``float32[examples, features]`` vectors of length 1.
      teacher: The same of the teacher.
      log_partition: ``float32[2]``, of the student's and the teacher's scores.
      measured: ``bool[]``, whether `log_partition` has been set by a batch.
    """

    student: jax.Array
    teacher: jax.Array
    log_partition: jax.Array
    measured: jax.Array


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """Settings of `contrastive`, and its four functions.

    Attributes:
      examples: Size of the training set.
      features: Of an embedding.
      negatives: Drawn for each example.
      temperature: Of the scores.
      momentum: Of the memory.
    """

    examples: int
    features: int
    negatives: int
    temperature: float
    momentum: float

    def init(self, key: jax.Array) -> ContrastiveMemory:
        """Random directions, the same for the same key."""
        shape = (2, self.examples, self.features)
        student, teacher = unit(jax.random.normal(key, shape, jnp.float32))
        return ContrastiveMemory(
            student, teacher, jnp.zeros(2, jnp.float32), jnp.zeros((), bool)
        )

    def sample(self, key: jax.Array, indices: jax.Array) -> jax.Array:
        """Negatives of each example: others, uniformly and with replacement.

        Args:
          key: Consumed once.
          indices: ``int[batch]``, which examples of the training set these are.

        Returns:
          ``int32[batch, negatives]``, never the example's own index.
        """
        shape = (*jnp.shape(indices), self.negatives)
        drawn = jax.random.randint(key, shape, 0, self.examples - 1, jnp.int32)
        own = jnp.asarray(indices)[..., None].astype(jnp.int32)
        return drawn + (drawn >= own).astype(jnp.int32)

    def loss(
        self,
        memory: ContrastiveMemory,
        student: jax.Array,
        teacher: jax.Array,
        indices: jax.Array,
        negatives: jax.Array,
        *,
        where: jax.Array | None = None,
    ) -> jax.Array:
        """The loss of each example; see `contrastive`.

        Args:
          memory: Before this batch.
          student: ``float[batch, features]`` embeddings.
          teacher: The same of the teacher. Gradients flow to both.
          indices: ``int[batch]``, in ``[0, examples)``.
          negatives: ``int[batch, negatives]``, from `sample` or chosen otherwise, such
            as from other classes.
          where: ``bool[batch]`` examples to count.

        Returns:
          ``float32[batch]``, zero for what does not count.

        Raises:
          ValueError: If a shape or dtype is wrong.
        """
        scores = self._scores(memory, student, teacher, indices, negatives, where)
        log_partition, _ = self._partition(memory, scores, where)
        prior = math.log(self.negatives / self.examples)
        odds = scores - log_partition[:, None, None] - prior
        positive, others = odds[..., 0], odds[..., 1:]
        loss = jax.nn.softplus(-positive) + jax.nn.softplus(others).sum(-1)
        return kept(loss.sum(0), where)

    def update(
        self,
        memory: ContrastiveMemory,
        student: jax.Array,
        teacher: jax.Array,
        indices: jax.Array,
        negatives: jax.Array,
        *,
        where: jax.Array | None = None,
    ) -> ContrastiveMemory:
        """The memory after a batch; no gradient flows through it.

        Args:
          memory: Before this batch.
          student: As for `loss`.
          teacher: As for `loss`.
          indices: As for `loss`, no two the same among those that count.
          negatives: As for `loss`; used by the first batch, for the partition.
          where: ``bool[batch]`` examples to count; the memory of others is untouched.

        Returns:
          Memory in which the entries of the batch moved toward its embeddings.
        """
        scores = self._scores(memory, student, teacher, indices, negatives, where)
        log_partition, measured = self._partition(memory, scores, where)
        rows = jnp.asarray(indices)
        if where is not None:  # Out of range, so that they are dropped.
            rows = jnp.where(where, rows, self.examples)

        def moved(bank: jax.Array, x: jax.Array) -> jax.Array:
            past = bank.at[rows].get(mode="clip")
            now = unit(widened(x, where))
            mixed = unit(self.momentum * past + (1.0 - self.momentum) * now)
            return bank.at[rows].set(mixed, mode="drop")

        after = ContrastiveMemory(
            moved(memory.student, student),
            moved(memory.teacher, teacher),
            log_partition,
            measured,
        )
        return jax.tree.map(jax.lax.stop_gradient, after)

    def _scores(
        self,
        memory: ContrastiveMemory,
        student: jax.Array,
        teacher: jax.Array,
        indices: jax.Array,
        negatives: jax.Array,
        where: jax.Array | None,
    ) -> jax.Array:
        """``float32[2, batch, 1 + negatives]``, the example's own first."""
        self._check(memory, student, teacher, indices, negatives, where)
        banks = memory.teacher, memory.student
        # All examples' scores, then a choice: less than [batch, negatives, features].
        everyone = jnp.stack(
            [
                products(unit(widened(x, where)), jax.lax.stop_gradient(bank))
                for x, bank in zip((student, teacher), banks, strict=True)
            ]
        )
        own = jnp.asarray(indices)[:, None].astype(jnp.int32)
        chosen = jnp.concatenate([own, jnp.asarray(negatives).astype(jnp.int32)], -1)
        chosen = jnp.broadcast_to(chosen, (2, *chosen.shape))
        return jnp.take_along_axis(everyone, chosen, axis=-1) / self.temperature

    def _partition(
        self, memory: ContrastiveMemory, scores: jax.Array, where: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Logs of the partition functions, fixed by the first batch that counts."""
        counts = jnp.ones(scores.shape[1], bool) if where is None else where
        number = counts.sum(dtype=jnp.float32) * scores.shape[-1]
        some = number > 0
        mask = jnp.broadcast_to((counts | ~some)[:, None], scores.shape[1:])
        total = jax.nn.logsumexp(
            jax.lax.stop_gradient(scores),
            axis=(1, 2),
            where=jnp.broadcast_to(mask, scores.shape),
        )
        mean = total - jnp.log(jnp.where(some, number, 1.0))
        first = mean + math.log(self.examples)
        known = jax.lax.stop_gradient(memory.log_partition)
        return jnp.where(memory.measured, known, first), memory.measured | some

    def _check(
        self,
        memory: ContrastiveMemory,
        student: jax.Array,
        teacher: jax.Array,
        indices: jax.Array,
        negatives: jax.Array,
        where: jax.Array | None,
    ) -> None:
        who = "distill.contrastive"
        number = jnp.shape(indices)[:1]
        bank, row = (self.examples, self.features), (*number, self.features)
        expected = {
            "memory.student": (memory.student, bank),
            "memory.teacher": (memory.teacher, bank),
            "student": (student, row),
            "teacher": (teacher, row),
            "indices": (indices, number),
            "negatives": (negatives, (*number, self.negatives)),
        }
        for name, (x, shape) in expected.items():
            if jnp.shape(x) != shape:
                raise ValueError(
                    f"{who}: {name} must be of shape {shape} for {self}; got "
                    f"{jnp.shape(x)}. Map features to {self.features} with "
                    "distill.linear_projector, and make memory and negatives with init "
                    "and sample."
                )
        for name in ("indices", "negatives"):
            dtype = expected[name][0].dtype
            if not jnp.issubdtype(dtype, jnp.integer):
                raise ValueError(
                    f"{who}: {name} must be integers, places in the training set; got "
                    f"{dtype}. Pass {name}.astype(jnp.int32)."
                )
        check_where(who, where, number)
        check_finite(who, teacher, where)


def contrastive(
    *,
    examples: int,
    features: int = 128,
    negatives: int = 16384,
    temperature: float = 0.07,
    momentum: float = 0.5,
) -> Contrastive:
    r"""Tell a student's embedding of an example from those of others, and vice versa.

    .. math:: -\log h(s_i, t_i) - \sum_{k=1}^{N} \log (1 - h(s_i, t_{j_k})), \quad
       h(s, t) = \frac{e^{s \cdot t / \tau} / Z}{e^{s \cdot t / \tau} / Z + N / M}

    for embeddings of length 1, :math:`N` negatives of the :math:`M` examples, plus the
    same with student and teacher exchanged. Embeddings of negatives come from a memory
    of all examples, kept for both models and moved toward each batch's:
    :math:`m \leftarrow \mu m + (1 - \mu) s`, scaled to length 1.

    The memory is explicit: ``init(key)`` makes it, ``sample(key, indices)`` draws
    negatives, ``loss(memory, student, teacher, indices, negatives)`` reads it, and
    ``update`` of the same arguments returns the next. All are pure; put the memory in
    the training state and in checkpoints.

    Gradients flow to both embeddings, since the teacher's projector is trained too:
    keep both projectors in the student's params, and the teacher itself out of them.

    Args:
      examples: :math:`M`, the size of the training set.
      features: Of an embedding. The memory takes ``8 * examples * features`` bytes.
      negatives: :math:`N`, for each example.
      temperature: :math:`\tau`.
      momentum: :math:`\mu` in [0, 1).

    Returns:
      The settings with their functions. A batch's loss needs a temporary of
      ``[2, batch, examples]``.

    Raises:
      ValueError: If a size is below 1 (`examples` below 2), or `temperature` or
        `momentum` out of range.

    Examples:
      >>> crd = contrastive(examples=6, features=4, negatives=3)
      >>> memory = crd.init(jax.random.key(0))
      >>> x, rows = jnp.eye(2, 4), jnp.array([5, 1])
      >>> drawn = crd.sample(jax.random.key(1), rows)
      >>> loss = crd.loss(memory, x, x, rows, drawn)
      >>> memory = crd.update(memory, x, x, rows, drawn)
      >>> loss.shape, drawn.shape, bool(memory.measured)
      ((2,), (2, 3), True)

    References:
      Tian et al., `Contrastive Representation Distillation
      <https://arxiv.org/abs/1910.10699>`_, 2020, eqs. 18 and 19; memory, momentum and
      the constant :math:`Z`, the first batch's mean score times :math:`M`, as in the
      authors' code. Differs: the memory begins as directions, uniform on the sphere.
    """
    who = "distill.contrastive"
    if examples < 2 or features < 1 or negatives < 1:
        raise ValueError(
            f"{who}: examples must be 2 or more, features and negatives 1 or more; got "
            f"{examples}, {features} and {negatives}."
        )
    check_positive(who, "temperature", temperature)
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"{who}: momentum must be in [0, 1); got {momentum}.")
    return Contrastive(
        examples=examples,
        features=features,
        negatives=negatives,
        temperature=temperature,
        momentum=momentum,
    )
