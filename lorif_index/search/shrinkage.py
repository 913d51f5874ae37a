"""Shrinkage: scores that are to be summed, with those that cannot be told from noise made small.

Most examples have little to do with a question, and their scores are spread about zero by chance overlap of gradients
and by rounded rows. One does not matter; thousands, summed, drown the few that count. A score s becomes
s * s^2 / (s^2 + t^2), nearly s where it is well above t and nearly nothing below: the empirical Wiener gain at the
universal threshold t = sigma * sqrt(2 ln n), which the largest of n normal noises hardly passes (Donoho and Johnstone,
Biometrika 81, 1994). sigma is told by the scores themselves, median |s| / 0.6745. TRAK (Park et al., arXiv:2303.14186)
thresholds its scores, too, at a level found by retraining; here nothing is fitted. A question's order stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from ..linalg.sampling import drawn
from .reader import Reader
from .scoring import Question, stream_scores

# The median of the absolute value of a standard normal variable.
_MEDIAN_NORMAL = 0.6744897501960817
# Of more rows a random sample of about so many tells sigma, to about half a percent.
SAMPLED = 1 << 16
# Questions whose scores of the sample are in memory together: 64 MiB. Bytes of rows that are read at once.
_TOGETHER, _ROWS_BYTES = 256, 64 << 20


def thresholds(scores: np.ndarray, count: int) -> torch.Tensor:
    """t (q,) float32 of questions, by scores (q, m) of some of `count` examples, or of all."""
    if not scores.size:
        return torch.zeros(len(scores))
    middle = np.array([np.median(np.abs(row)) for row in scores], dtype=np.float64)
    return torch.from_numpy(middle * (math.sqrt(2.0 * math.log(max(count, 1))) / _MEDIAN_NORMAL)).float()


def shrink(scores: torch.Tensor, thresholds: torch.Tensor) -> None:
    """Shrinks scores (q, m) float32, in place, by their questions' thresholds (q,)."""
    # Of the ratio, squared: it neither overflows nor vanishes, whatever the scores' units. 0 / 0 leaves all as it is.
    ratio = (thresholds.to(scores.device)[:, None] / scores.abs()).nan_to_num_(nan=0.0, posinf=math.inf)
    scores.div_(ratio.square_().add_(1.0))


def shrinking(reader: Reader, question: Question) -> Question:
    """The question, whose scores a scan shrinks. Over several ranks all call this, and have the same thresholds."""
    found = []
    for start in range(0, question.count, _TOGETHER):
        parts = reader.ranks.gather(_some_scores(reader, question.some(slice(start, start + _TOGETHER))))
        scores = parts[0] if len(parts) == 1 else np.concatenate(parts)
        found.append(thresholds(scores.T, reader.live_count))
    return replace(question, thresholds=torch.cat(found))


def _some_scores(reader: Reader, question: Question) -> np.ndarray:
    """(m, q) scaled scores of this rank's rows: of all where the index has few, else of those in a sample."""
    out: np.ndarray = np.empty((0, question.count), dtype=np.float32)
    with reader.ranks.jointly():
        if reader.live_count > SAMPLED:
            out = _sampled(reader, question)
        else:
            out = np.concatenate([out, *(scores.T.cpu().numpy() for _, scores, _ in _scanned(reader, question))])
    return out


def _scanned(reader: Reader, question: Question) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    resident = reader.rows.resident
    return stream_scores(resident, reader.codec.scorer(question.parts, resident.device), question)


def _sampled(reader: Reader, question: Question) -> np.ndarray:
    """(m, q) scaled scores of this rank's rows among some at random."""
    store, codec, team = reader.store, reader.codec, reader.rows.team
    # By positions in the whole index, so that the rows are the same ones however many ranks hold them.
    wanted = np.sort(drawn(len(team), SAMPLED * len(team) // reader.live_count, 0, "shrinkage"))
    local = team.locally(wanted)[1]
    if store.dead is not None:
        local = local[~store.dead[local]]
    scorer, step = codec.scorer(question.parts, reader.device), _ROWS_BYTES // codec.row_bytes + 1
    out = np.empty((len(local), question.count), dtype=np.float32)
    for start in range(0, len(local), step):
        block = store.gather(local[start : start + step]).to(reader.device)
        out[start : start + len(block)] = scorer.score(block).cpu().T.numpy()
    if question.scale is not None:
        out *= question.scale[np.searchsorted(store.live, local)].numpy()[:, None]
    return out
