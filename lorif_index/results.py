"""Results: what a search returns, with its diagnosis."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError
from .markup import table
from .tables import can_be_picked, merged, picked_from, to_dataset, to_parquet

if TYPE_CHECKING:
    import pandas

_SHOWN = 20


@dataclass(frozen=True)
class Reranked:
    """What came of computing the best by rows again with the model.

    Attributes:
        candidates: T, the best by rows that were computed again for each query.
        computed: examples that were computed again; one that several queries share counts once.
        changed: for each query, how many of its k hits are not among the k best by rows.
        rows_recall: estimated recall of the T best by rows, the mean over the queries.
        seconds: that it took.
    """

    candidates: int
    computed: int
    changed: list[int]
    rows_recall: float
    seconds: float


@dataclass(frozen=True)
class Refined:
    """How the inverse of a search's queries was refined (see `Refine`).

    Attributes:
        iterations: at most.
        examples: training examples that the Gauss-Newton matrix is of.
        share: of the stored curvature in the matrix.
        residuals: for each query, how far x was from solving, H^-1's norm of what was left over that of the query: with
            the stored inverse, then after each step.
        way: how products were found (`capture.products.WAYS`).
        seconds: that it took.
    """

    iterations: int
    examples: int
    share: float
    residuals: list[list[float]]
    way: str
    seconds: float


@dataclass(frozen=True)
class SearchStats:
    """How an answer was found.

    Attributes:
        exact: every row was scored; "exact" means exact for what is stored.
        codec: name of the codec that rows are written by.
        dtype: how a row's numbers are stored: "float16", "1 bits".
        examined: rows scored exactly for the query that took most.
        total: rows in the index.
        bytes_read: from the shards, for all queries together.
        seconds: by stage: "gradients", "transform" (refining is in it), then "scan", or "coarse", "gather",
            "rescore" and "check"; then "rerank".
        damping: the policy, as JSON.
        layers: how many layers the scores are summed over.
        approximate: scores are coarse ones, not exact for anything stored.
        plan: how the answer was sought, and why.
        candidates: the same as examined, or 0 where no candidate was rescored.
        recall: what was asked for; 1 for a scan.
        estimated_recall: mean over the queries; NaN where nothing is known.
        recall_by_query: the estimate for each query.
        candidates_by_query: rows rescored for each query.
        skipped: rows that no answer can have, because their shard is damaged (`Index.open(damaged="skip")`).
        reranked: what computing the best again has changed, or None. Estimates of recall are then those of both stages
            (see `search.rerank`).
        refined: how the queries' inverse was refined, or None where it is the stored one.
    """

    exact: bool
    codec: str
    dtype: str
    examined: int
    total: int
    bytes_read: int
    seconds: dict[str, float]
    damping: dict[str, Any]
    layers: int
    approximate: bool = False
    plan: str = ""
    candidates: int = 0
    recall: float = 1.0
    estimated_recall: float = 1.0
    recall_by_query: list[float] = field(default_factory=list)
    candidates_by_query: list[int] = field(default_factory=list)
    skipped: int = 0
    reranked: Reranked | None = None
    refined: Refined | None = None


@dataclass(frozen=True)
class Group:
    """What the training examples with one value do to a query.

    Attributes:
        value: of the payload's field, or a tuple of several; None also stands for examples that have none.
        sum: of the scores; sum / N estimates, to first order, the change of the query's loss, in nats, if all of them
            were left out.
        count: examples.
        positive, negative: the sum's two parts, of proponents and of opponents.
    """

    value: str | int | float | bool | tuple[Any, ...] | None
    sum: float
    count: int
    positive: float
    negative: float

    @property
    def mean(self) -> float:
        """sum / count."""
        return self.sum / self.count


@dataclass(frozen=True)
class Groups:
    """The whole training set's scores, summed by a field of the payloads; `groups[0]` are those of the first query.

    Attributes:
        by: the field, or the name of the function; of several fields their names.
        queries: for each query its groups, largest sum first.
        examples: how many were summed.
        found: how many groups there are, where `k` has cut the lists.
    """

    by: str | list[str]
    queries: list[list[Group]]
    examples: int
    found: int

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.queries)

    def __getitem__(self, query: int) -> list[Group]:
        return self.queries[query]

    def __iter__(self) -> Iterator[list[Group]]:
        return iter(self.queries)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        queries = [[asdict(group) | {"mean": group.mean} for group in groups] for groups in self.queries]
        return {"by": self.by, "examples": self.examples, "found": self.found, "queries": queries}

    def to_pandas(self) -> pandas.DataFrame:
        """One row a query and group: query, the field's name or "value", sum, count, mean, positive, negative.

        Raises:
            ConfigError: pandas is not installed.
        """
        return _pandas().DataFrame(self.columns())

    def columns(self) -> dict[str, list[Any]]:
        """query, value, sum, count, mean, positive and negative of every group.

        Of several fields each has a column of its own name, with "group." before it where another has that name, and
        its number behind it where two have one."""
        rows = [(q, group) for q, groups in enumerate(self.queries) for group in groups]
        sums = ("sum", "count", "mean", "positive", "negative")
        out: dict[str, list[Any]] = {"query": [q for q, _ in rows]}
        if isinstance(self.by, str):
            out["value"] = [group.value for _, group in rows]
        else:
            for i, name in enumerate(self.by):
                name = f"group.{name}" if name in ("query", *sums) else name
                name = f"{name}.{i + 1}" if name in out else name
                out[name] = [group.value[i] for _, group in rows]  # type: ignore[index]
        return out | {name: [getattr(group, name) for _, group in rows] for name in sums}

    def matrix(self) -> tuple[list[Any], np.ndarray]:
        """The groups' values (g,), in the order of their sums over all queries, and the sums (g, q) float64: what each
        source does to each question. A group that `k` has cut off a query counts 0 there."""
        values: dict[Any, Any] = {}
        sums: dict[Any, np.ndarray] = {}
        for q, groups in enumerate(self.queries):
            for group in groups:
                parts = group.value if isinstance(group.value, tuple) else (group.value,)
                # 1, 1.0 and True are three groups.
                key = tuple((type(part), part) for part in parts)
                values[key] = group.value
                sums.setdefault(key, np.zeros(len(self)))[q] = group.sum
        order = sorted(sums, key=lambda key: -float(sums[key].sum()))
        found = np.stack([sums[key] for key in order]) if order else np.zeros((0, len(self)))
        return [values[key] for key in order], found

    def to_dataset(self) -> Any:
        """A Hugging Face `Dataset` of `columns`; ConfigError where datasets is not installed."""
        return to_dataset(self.columns())

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Writes `columns` to a Parquet file; ConfigError where pyarrow is not installed."""
        to_parquet(self.columns(), path)

    def _repr_html_(self) -> str:
        parts = []
        for q, groups in enumerate(self.queries[:_SHOWN]):
            rows = [(g.value, g.sum, g.count, g.mean, g.positive, g.negative) for g in groups[:_SHOWN]]
            header = (
                self.by if isinstance(self.by, str) else ", ".join(self.by),
                "sum",
                "examples",
                "mean",
                "positive",
                "negative",
            )
            parts.append(table(header, rows, f"query {q}: {self.found:,} groups of {self.examples:,} examples"))
        return "".join(parts)


@dataclass(frozen=True)
class Selection:
    """Training examples that were chosen for some questions together, in the order in which they were taken.

    Attributes:
        ids: (n,) int64, the index's row ids.
        scores: (n,) float32: of "round-robin" that of the question that took the example, else the sum over questions.
        question_of: (n,) int64: the question that took it, or that it scores best for.
        method: how they were chosen.
        exhausted: questions that were given examples which do not lower their loss, for want of others.
        ties: how often another example had the very score of the one that was taken; the earlier one is.
        payloads: of the examples, as they were given to `build` or `add`; None where there are none.
    """

    ids: np.ndarray
    scores: np.ndarray
    question_of: np.ndarray
    method: str
    exhausted: list[int]
    ties: int
    payloads: list[Any] | None = None
    _pieces: tuple[tuple[int, Any], ...] = field(default=(), repr=False, compare=False)

    def __len__(self) -> int:
        """n."""
        return len(self.ids)

    def columns(self, data: Any = None) -> dict[str, list[Any]]:
        """id, score and question, then the fields of the examples.

        Args:
            data: what the index was built from, in the same order; by default what `build`, `add` or `open` was given,
                else the payloads.

        Raises:
            DataError: data that do not give an example by its number.
        """
        pieces = self._pieces if data is None else ((0, data),)
        if data is None and self.payloads is not None and not all(can_be_picked(piece) for _, piece in pieces):
            pieces = ()
        fixed = {"id": self.ids.tolist(), "score": self.scores.tolist(), "question": self.question_of.tolist()}
        return merged(fixed, list(picked_from(pieces, self.ids)) if pieces else self.payloads)

    def to_dataset(self, data: Any = None) -> Any:
        """A Hugging Face `Dataset` of the examples, to train on: `columns`.

        Raises:
            ConfigError: datasets is not installed. DataError: as `columns`.
        """
        return to_dataset(self.columns(data))

    def to_parquet(self, path: str | os.PathLike[str], data: Any = None) -> None:
        """Writes `columns` to a Parquet file; ConfigError where pyarrow is not installed."""
        to_parquet(self.columns(data), path)


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise ConfigError("to_pandas needs pandas, which is not installed: pip install pandas") from None
    return pandas


@dataclass(frozen=True)
class Hits:
    """The k best rows of each query, best first.

    Attributes:
        ids: (q, k) int64, the index's row ids: positions in the training data.
        scores: (q, k) float32; score / N estimates the change of the query's loss, in nats, if that example were left
            out. Positive: a proponent.
        stats: how they were found.
        payloads: for each query those of its hits, as they were given to `build` or `add`; None where there are none.
        groups: the whole training set's groups, where the search was asked for them (`group_by=`).
        lexical: (q, k) int64, each hit's rank by its words alone, from 1, and 0 where it shares none with the query
            (`lexical=True`).
    """

    ids: np.ndarray
    scores: np.ndarray
    stats: SearchStats
    payloads: list[list[Any]] | None = None
    groups: Groups | None = None
    lexical: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.ids)

    def __repr__(self) -> str:
        q, k = self.ids.shape
        lines = [f"Hits: {q} queries x {k} of {self.stats.total} examples, {self.stats.codec}: {self.stats.plan}"]
        for row in range(min(q, 3)):
            best = ", ".join(
                f"{i}: {s:.4g}" for i, s in zip(self.ids[row, :5].tolist(), self.scores[row, :5].tolist(), strict=True)
            )
            lines.append(f"  [{row}] {best}{', ...' if k > 5 else ''}")
        if q > 3:
            lines.append("  ...")
        return "\n".join(lines)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a hit: query, rank (from 1), id, score, lexical if it was asked for, then the payloads: a column for
        each of their fields, or one called "payload" where they have none. A field with the name of another column gets
        "payload." before it.

        Raises:
            ConfigError: pandas is not installed.
        """
        return _pandas().DataFrame(self.columns())

    def columns(self) -> dict[str, list[Any]]:
        """The columns of `to_pandas`."""
        fields, rows = self._fields(), list(self._rows(len(self), self.ids.shape[1]))
        fixed = self._fixed
        out: dict[str, list[Any]] = {name: [row[i] for row in rows] for i, name in enumerate(fixed)}
        values = [self._values(row[-1], fields) for row in rows]
        return out | {(f"payload.{f}" if f in fixed else f): [v[i] for v in values] for i, f in enumerate(fields)}

    def to_dataset(self) -> Any:
        """A Hugging Face `Dataset` of `columns`; ConfigError where datasets is not installed."""
        return to_dataset(self.columns())

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Writes `columns` to a Parquet file; ConfigError where pyarrow is not installed."""
        to_parquet(self.columns(), path)

    def _repr_html_(self) -> str:
        fields = self._fields()
        rows = [(*row[:-1], *self._values(row[-1], fields)) for row in self._rows(_SHOWN, _SHOWN)]
        queries, k = self.ids.shape
        caption = f"{queries} queries x {k} hits of {self.stats.total:,} examples; {self.stats.plan}"
        groups = "" if self.groups is None else self.groups._repr_html_()
        return table((*self._fixed, *fields), rows, caption) + groups

    @property
    def _fixed(self) -> tuple[str, ...]:
        """Names of the columns before the payloads'."""
        return ("query", "rank", "id", "score") + (() if self.lexical is None else ("lexical",))

    def _rows(self, queries: int, k: int) -> Iterator[tuple[Any, ...]]:
        """The columns before the payload's, and the payload, of the first hits of the first queries."""
        for q, (ids, scores) in enumerate(
            zip(self.ids[:queries].tolist(), self.scores[:queries].tolist(), strict=True)
        ):
            for place, (i, score) in enumerate(zip(ids[:k], scores[:k], strict=True)):
                words = () if self.lexical is None else (int(self.lexical[q, place]),)
                yield (q, place + 1, i, score, *words, None if self.payloads is None else self.payloads[q][place])

    def _fields(self) -> list[str]:
        """The payloads' fields, in order of appearance; ["payload"] where one is no object."""
        payloads = [p for row in self.payloads or [] for p in row if p is not None]
        if not all(isinstance(p, dict) for p in payloads):
            return ["payload"]
        return list(dict.fromkeys(key for p in payloads for key in p))

    def _values(self, payload: Any, fields: list[str]) -> list[Any]:
        if isinstance(payload, dict) and fields != ["payload"]:
            return [payload.get(key) for key in fields]
        return [payload] if fields == ["payload"] else [None] * len(fields)
