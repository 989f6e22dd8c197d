"""Seeded synthetic tasks with exact answers: copy, induction, associative recall, modular arithmetic, Dyck, ListOps.

Every example is a pure function of (seed, split, index). `weights` marks the targets that are determined by what comes before
them; `answers` computes those targets again from the tokens alone, by another route, and so is the oracle for a model and for
the generator. Ids from 0 to 3 are shared by all tasks; a task's own symbols start at `FIRST_SYMBOL`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np

from sparsejax.data.counter_random import generator
from sparsejax.plugs import check, check_choice, register

PAD, BOS, SEPARATOR, EQUALS = range(4)
FIRST_SYMBOL = 4
NO_ANSWER = -1


class SymbolExample(NamedTuple):
    """One row: int32[T] tokens, targets, segment_ids, positions; float32[T] weights; a class label, or -1 without one."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    label: int = -1


class SymbolTask(abc.ABC):
    """What the synthetic tasks share: a source whose examples are generated, not read."""

    content: ClassVar[str] = "symbols"
    num_classes: ClassVar[int] = 0

    def open(self, directories: object) -> SymbolTask:
        return self

    def check_length(self, length: int) -> None:
        """Raise a ConfigError where a row of `length` tokens is too short for one example."""
        check(length >= self.least_length, "data.sequence_length", length, f"{self.name} needs at least {self.least_length}")

    @property
    def name(self) -> str:
        return repr(self)

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Ids in use, the shared ones included."""

    @property
    @abc.abstractmethod
    def least_length(self) -> int:
        """The shortest row that holds an example."""

    def example(self, seed: int, split: str, index: int, length: int) -> SymbolExample:
        """Example number `index` of a split, in a row of `length` tokens."""
        return self.generate(generator(seed, f"{self.name}/{split}", index), length, split)

    @abc.abstractmethod
    def generate(self, random: np.random.Generator, length: int, split: str) -> SymbolExample: ...

    @abc.abstractmethod
    def answers(self, tokens: np.ndarray) -> np.ndarray:
        """int32[T]: the determined target at each position of a row of tokens, `NO_ANSWER` where there is none."""


def _row(sequence: np.ndarray, answer: np.ndarray, length: int, label: int = -1) -> SymbolExample:
    """A padded row of one segment that predicts `sequence[1:]` from `sequence[:-1]`, weighted where `answer` is true."""
    used = len(sequence) - 1
    return SymbolExample(_padded(sequence[:-1], length), _padded(sequence[1:], length), _padded(answer[1:], length, np.float32),
                         _padded(np.ones(used), length), _padded(np.arange(used), length), label)


def _padded(values: np.ndarray, length: int, dtype: type = np.int32) -> np.ndarray:
    padded: np.ndarray = np.zeros(length, dtype)  # PAD is 0; np.pad takes twenty times as long
    padded[:len(values)] = values
    return padded


@register("source", "copy")
@dataclass(frozen=True)
class Copy(SymbolTask):
    """BOS x_1 .. x_n SEPARATOR x_1 .. x_n: the second half is determined. n is uniform from 1 to what fits."""

    symbols: int = 16

    def __post_init__(self) -> None:
        check(self.symbols >= 1, "copy.symbols", self.symbols, "must be at least 1")

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + self.symbols

    @property
    def least_length(self) -> int:
        return 3

    def generate(self, random: np.random.Generator, length: int, split: str) -> SymbolExample:
        count = int(random.integers(1, (length - 1) // 2 + 1))
        text = random.integers(FIRST_SYMBOL, self.vocab_size, count)
        sequence = np.concatenate([[BOS], text, [SEPARATOR], text])
        return _row(sequence, np.arange(len(sequence)) > count + 1, length)

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        answers = np.full(len(tokens), NO_ANSWER, np.int32)
        border = tokens.tolist().index(SEPARATOR)
        answers[border:2 * border - 1] = tokens[1:border]
        return answers


@register("source", "induction")
@dataclass(frozen=True)
class Induction(SymbolTask):
    """In-context bigrams (induction heads, Olsson et al., 2022, arXiv 2209.11895).

    In each row every trigger symbol has one successor, drawn for that row, which follows it wherever it occurs; all other
    symbols are random. The successor is determined from the trigger's second occurrence on.
    """

    symbols: int = 16
    triggers: int = 4

    def __post_init__(self) -> None:
        check(self.triggers >= 1, "induction.triggers", self.triggers, "must be at least 1")
        check(self.symbols > self.triggers, "induction.symbols", self.symbols, "must exceed the triggers")

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + self.symbols

    @property
    def least_length(self) -> int:
        return 4 * (self.triggers + 1)

    def generate(self, random: np.random.Generator, length: int, split: str) -> SymbolExample:
        first_plain = FIRST_SYMBOL + self.triggers
        successors = random.integers(first_plain, self.vocab_size, self.triggers)
        draws = random.integers(FIRST_SYMBOL, self.vocab_size, length + 1)
        trigger_next = random.random(length + 1) < 0.25  # often enough that most triggers recur in a short row
        draws = np.where(trigger_next, random.integers(FIRST_SYMBOL, first_plain, length + 1), draws)
        sequence, answer = draws, np.zeros(length + 1, bool)
        sequence[0] = BOS
        seen: set[int] = set()
        for t in range(1, length + 1):
            before = int(sequence[t - 1])
            if FIRST_SYMBOL <= before < first_plain:
                sequence[t] = successors[before - FIRST_SYMBOL]
                answer[t] = before in seen
                seen.add(before)
        return _row(sequence, answer, length)

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        answers = np.full(len(tokens), NO_ANSWER, np.int32)
        for t, token in enumerate(tokens):
            earlier = np.flatnonzero(tokens[:t] == token)
            if FIRST_SYMBOL <= token < FIRST_SYMBOL + self.triggers and len(earlier):
                answers[t] = tokens[earlier[0] + 1]
        return answers


@register("source", "mqar")
@dataclass(frozen=True)
class MultiQueryRecall(SymbolTask):
    """Multi-query associative recall (Zoology, Arora et al., 2023, arXiv 2312.04927).

    k_1 v_1 .. k_P v_P, then each key again at a place whose distance follows the power law x^(power - 1), with random symbols
    between that are no keys of the row; the target at a repeated key is its value. Half of the symbols are keys, half values.
    Published: (length, pairs) = (64, 4), (128, 8), (256, 16), (512, 64); 8192 symbols; power .01.
    """

    pairs: int = 4
    symbols: int = 8192
    power: float = 0.01

    def __post_init__(self) -> None:
        check(self.pairs >= 1, "mqar.pairs", self.pairs, "must be at least 1")
        check(self.symbols >= 2 * self.pairs, "mqar.symbols", self.symbols, "half of them are keys: 2 * pairs are needed")
        check(self.power > 0, "mqar.power", self.power, "must be positive")

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + self.symbols

    @property
    def least_length(self) -> int:
        return 4 * self.pairs

    def generate(self, random: np.random.Generator, length: int, split: str) -> SymbolExample:
        half, context = self.symbols // 2, 2 * self.pairs
        keys = FIRST_SYMBOL + random.choice(half, self.pairs, replace=False)
        values = FIRST_SYMBOL + half + random.choice(self.symbols - half, self.pairs, replace=False)
        space = (length - context) // 2
        density = np.arange(1, space + 1, dtype=np.float64) ** (self.power - 1)
        places = context + 2 * random.choice(space, self.pairs, replace=False, p=density / density.sum())
        tokens = _symbols_without(random, keys, FIRST_SYMBOL, self.vocab_size, length)
        tokens[0:context:2], tokens[1:context:2] = keys, values
        tokens[places] = keys
        weights = np.zeros(length, np.float32)
        weights[places] = 1
        targets = np.concatenate([tokens[1:], [PAD]]).astype(np.int32)
        targets[places] = values
        return SymbolExample(tokens, targets, weights, np.ones(length, np.int32), np.arange(length, dtype=np.int32))

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        recall = dict(zip(tokens[0:2 * self.pairs:2].tolist(), tokens[1:2 * self.pairs:2].tolist(), strict=True))
        later = np.arange(len(tokens)) >= 2 * self.pairs
        return np.array([recall.get(t, NO_ANSWER) if late else NO_ANSWER
                         for t, late in zip(tokens.tolist(), later, strict=True)], np.int32)


def _symbols_without(random: np.random.Generator, excluded: np.ndarray, low: int, high: int, count: int) -> np.ndarray:
    """`count` int32 symbols uniform over [low, high) without those excluded, so that no filler is a query by accident."""
    draws = random.integers(low, high - len(excluded), count)
    for value in np.sort(excluded):
        draws += draws >= value
    return draws.astype(np.int32)


@register("source", "modular")
@dataclass(frozen=True)
class ModularArithmetic(SymbolTask):
    """Equations `a ∘ b = c (mod p)` (grokking, Power et al., 2022, arXiv 2201.02177).

    A row holds as many equations as fit, each a segment of four tokens, the last of which has c as its target. A fixed random
    `train_fraction` of the p^2 pairs is for training, the rest for evaluation, whatever the seed.
    """

    modulus: int = 97
    operation: str = "add"
    train_fraction: float = 0.5

    def __post_init__(self) -> None:
        check(self.modulus >= 2, "modular.modulus", self.modulus, "must be at least 2")
        check_choice("modular.operation", self.operation, ("add", "sub", "mul"))
        pairs = self.modulus**2
        check(1 <= round(pairs * self.train_fraction) < pairs, "modular.train_fraction", self.train_fraction,
              "must leave pairs for training and for evaluation")

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + 1 + self.modulus

    @property
    def least_length(self) -> int:
        return 4

    def pairs(self, split: str) -> np.ndarray:
        """Numbers `a * p + b` of the pairs of a split."""
        order = generator(0, "modular/pairs", self.modulus).permutation(self.modulus**2)
        cut = round(len(order) * self.train_fraction)
        return order[:cut] if split == "train" else order[cut:]

    def generate(self, random: np.random.Generator, length: int, split: str) -> SymbolExample:
        count = length // 4
        pairs = _cached_pairs(self, split)
        a, b = np.divmod(pairs[random.integers(len(pairs), size=count)], self.modulus)
        c = {"add": a + b, "sub": a - b, "mul": a * b}[self.operation] % self.modulus
        first = FIRST_SYMBOL + 1
        sign = np.full(count, FIRST_SYMBOL)
        tokens = np.stack([first + a, sign, first + b, np.full(count, EQUALS)], 1).reshape(-1)
        targets = np.stack([sign, first + b, np.full(count, EQUALS), first + c], 1).reshape(-1)
        weights = np.tile([0, 0, 0, 1], count)
        return SymbolExample(_padded(tokens, length), _padded(targets, length), _padded(weights, length, np.float32),
                             _padded(np.repeat(np.arange(1, count + 1), 4), length),
                             _padded(np.tile(np.arange(4), count), length))

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        answers = np.full(len(tokens), NO_ANSWER, np.int32)
        for t in np.flatnonzero(tokens == EQUALS):
            a, b = int(tokens[t - 3]) - FIRST_SYMBOL - 1, int(tokens[t - 1]) - FIRST_SYMBOL - 1
            value = {"add": a + b, "sub": a - b, "mul": a * b}[self.operation]
            answers[t] = FIRST_SYMBOL + 1 + value % self.modulus
        return answers


@lru_cache(8)
def _cached_pairs(task: ModularArithmetic, split: str) -> np.ndarray:
    return task.pairs(split)


@register("source", "dyck")
@dataclass(frozen=True)
class Dyck(SymbolTask):
    """Completion of a Dyck-(k, m) prefix (bounded nesting, Hewitt et al., 2020, arXiv 2010.07515).

    BOS, a random prefix of a word over k bracket types whose nesting never exceeds m, EQUALS, then the shortest completion and
    a final SEPARATOR; all that follows EQUALS is determined.
    """

    kinds: int = 4
    depth: int = 8

    def __post_init__(self) -> None:
        check(self.kinds >= 1, "dyck.kinds", self.kinds, "must be at least 1")
        check(self.depth >= 1, "dyck.depth", self.depth, "must be at least 1")

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + 2 * self.kinds

    @property
    def least_length(self) -> int:
        return 4

    def generate(self, random: np.random.Generator, length: int, split: str) -> SymbolExample:
        goal = int(random.integers(1, length - 2))  # tokens of the prefix; BOS, EQUALS and the completion must fit too
        opening, kinds = random.random(goal) < 0.5, random.integers(0, self.kinds, goal)
        prefix: list[int] = []
        stack: list[int] = []
        for wants_open, kind in zip(opening.tolist(), kinds.tolist(), strict=True):
            can_open = len(stack) < self.depth and len(prefix) + len(stack) + 4 <= length
            if can_open and (wants_open or not stack):
                stack.append(kind)
                prefix.append(FIRST_SYMBOL + kind)
            elif stack:
                prefix.append(FIRST_SYMBOL + self.kinds + stack.pop())
        closing = [FIRST_SYMBOL + self.kinds + kind for kind in reversed(stack)]
        sequence = np.array([BOS, *prefix, EQUALS, *closing, SEPARATOR])
        return _row(sequence, np.arange(len(sequence)) > len(prefix) + 1, length)

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        answers = np.full(len(tokens), NO_ANSWER, np.int32)
        border = tokens.tolist().index(EQUALS)
        word = (tokens[1:border] - FIRST_SYMBOL).tolist()
        while True:  # cancel adjacent pairs; what is left is the open brackets
            pair = next((i for i in range(len(word) - 1) if word[i] < self.kinds and word[i + 1] == word[i] + self.kinds), None)
            if pair is None:
                break
            del word[pair:pair + 2]
        completion = [FIRST_SYMBOL + self.kinds + kind for kind in reversed(word)] + [SEPARATOR]
        answers[border:border + len(completion)] = completion
        return answers


@register("source", "listops")
@dataclass(frozen=True)
class ListOps(SymbolTask):
    """Nested list operations (Nangia and Bowman, 2018, arXiv 1804.06028): `[MAX 2 9 [MIN 4 7 ] 0 ]` -> 9.

    Operators MIN, MAX, MED (median, rounded down) and SM (sum modulo 10) over digits; BOS, the expression, EQUALS, whose target
    is the value. Also a classification task with ten classes.
    """

    depth: int = 4
    arguments: int = 4

    num_classes: ClassVar[int] = 10
    operators: ClassVar[tuple[str, ...]] = ("MIN", "MAX", "MED", "SM")

    def __post_init__(self) -> None:
        check(self.depth >= 1, "listops.depth", self.depth, "must be at least 1")
        check(self.arguments >= 2, "listops.arguments", self.arguments, "must be at least 2")

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + 10 + len(self.operators) + 1  # digits, operators, the closing bracket

    @property
    def least_length(self) -> int:
        return 8

    def generate(self, random: np.random.Generator, length: int, split: str) -> SymbolExample:
        goal = int(random.integers((length - 2) // 2, length - 2 + 1))
        expression, value = self._expression(random, self.depth, goal)
        digit = FIRST_SYMBOL + value
        sequence = np.array([BOS, *expression, EQUALS, digit])
        return _row(sequence, np.arange(len(sequence)) == len(sequence) - 1, length, label=value)

    def _expression(self, random: np.random.Generator, depth: int, budget: int) -> tuple[list[int], int]:
        """Tokens (at most `budget`) and value of a random expression."""
        if depth == 0 or budget < 4:
            digit = int(random.integers(10))
            return [FIRST_SYMBOL + digit], digit
        count = int(random.integers(2, min(self.arguments, budget - 2) + 1))
        operator = int(random.integers(len(self.operators)))
        tokens, values, left = [FIRST_SYMBOL + 10 + operator], [], budget - 2
        for remaining in range(count, 0, -1):
            share = left if remaining == 1 else int(random.integers(1, left - remaining + 2))
            part, value = self._expression(random, depth - 1, share)
            tokens += part
            values.append(value)
            left -= len(part)
        return [*tokens, FIRST_SYMBOL + 14], _apply(self.operators[operator], values)

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        answers = np.full(len(tokens), NO_ANSWER, np.int32)
        border = tokens.tolist().index(EQUALS)
        stack: list[list[int]] = [[]]
        for symbol in (tokens[1:border] - FIRST_SYMBOL).tolist():
            if symbol < 10:
                stack[-1].append(symbol)
            elif symbol < 14:
                stack.append([symbol - 10])
            else:
                operator, *values = stack.pop()
                stack[-1].append(_apply(self.operators[operator], values))
        answers[border] = FIRST_SYMBOL + stack[0][0]
        return answers


def _apply(operator: str, values: list[int]) -> int:
    if operator == "SM":
        return sum(values) % 10
    if operator == "MED":
        return int(np.median(values))
    return min(values) if operator == "MIN" else max(values)
