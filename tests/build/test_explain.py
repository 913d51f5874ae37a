"""Explanations against autograd, position by position, in float64; their sums; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import SENTENCES, Case, close, cnn, gpt2, mlp, split, tiny_model_folder
from dense_curvature import relative
from dense_curvature import scores as dense_scores
from torch import nn

from lorif_index import BuildConfig, Index, LayerSelection, default_loss
from lorif_index.errors import DataError, QueryError
from lorif_index.identity import Identity
from lorif_index.linalg.projection import projection_matrix
from lorif_index.questions import Questions
from lorif_index.search.explain import Explanation
from lorif_index.snapshot import Access, Snapshot
from lorif_index.text import Document, TextQuestion, build_text_index, load_text_model, open_text_index
from lorif_index.text.model import token_strings

WHOLE: dict[str, Any] = dict(
    rank=None, curvature_rank=None, dtype="float32", store="factors", curvature="empirical", projection="random"
)


def gradients_of(index: Index, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    """Layer -> projected gradients of a batch, as the index asks with them."""
    return Questions(Snapshot.open(index.path, Access()), Identity(model)).gradients(batch, None, index.layers)


def largest(found: list[list[Explanation]]) -> float:
    return max(abs(e.score) for row in found for e in row)


def check_sums(found: list[list[Explanation]], within: float = 1e-5) -> None:
    """All decompositions sum to the score, relative to the largest."""
    most = max(sum(abs(share) for share in e.modules.values()) for row in found for e in row)
    for e in (e for row in found for e in row):
        parts = [sum(e.layers.values()), sum(e.modules.values()), sum(float(t.sum()) for t in e.layer_tokens.values())]
        parts += [] if e.tokens is None else [float(e.tokens.sum())]
        assert np.abs(np.array(parts) - e.score).max() <= within * most, (e.score, parts)
        # H^-1 is applied to the other side here.
        assert e.query_tokens is None or abs(float(e.query_tokens.sum()) - e.score) <= within * most


class Dense:
    """Shares by position, from oracle gradients and a dense inverse."""

    def __init__(self, case: Case, index: Index, uses: dict[str, list[tuple[str, bool]]]) -> None:
        self.case, self.uses = case, uses
        self.biases = {name: spec.bias for name, spec in index.specs.items()}
        self.sides = {
            name: (
                projection_matrix(0, name, "in", spec.width_in, spec.d_in).double().numpy(),
                projection_matrix(0, name, "out", spec.width_out, spec.d_out).double().numpy(),
            )
            for name, spec in index.specs.items()
        }
        self.inverse = {}
        for name, g in case.gradients(case.data).items():
            c = oracle.second_moment(oracle.project(g, *self.sides[name]))
            lam = oracle.damping("auto", c, row_bytes=index.bytes_per_example)
            self.inverse[name] = np.linalg.inv(c + lam * np.eye(len(c)))

    def positions(self, batch: Any) -> dict[str, dict[str, np.ndarray]]:
        """Layer -> module -> (T, d_in, d_out)."""
        found = oracle.position_gradients(self.case.model, batch, default_loss, self.uses, self.biases)
        return {
            layer: {module: oracle.project(g, *self.sides[layer]) for module, g in modules.items()}
            for layer, modules in found.items()
        }

    def shares(self, example: dict[str, dict[str, np.ndarray]], other: dict[str, dict[str, np.ndarray]]) -> Any:
        """Layer -> module -> (T,): of the example's positions, in the score with the other."""
        out: dict[str, dict[str, np.ndarray]] = {}
        for layer, modules in example.items():
            g = sum(p.sum(axis=0) for p in other[layer].values())
            turned = self.inverse[layer] @ g.ravel()
            out[layer] = {module: p.reshape(len(p), -1) @ turned for module, p in modules.items()}
        return out


def uses_of(case: Case) -> dict[str, list[tuple[str, bool]]]:
    uses = {name: [(name, inputs_first)] for name, (_, _, inputs_first) in case.weights.items()}
    if "transformer.wte" in uses:
        # One weight: the head's outputs are the embedding's inputs.
        uses["transformer.wte"].append(("lm_head", True))
    return uses


@pytest.mark.parametrize(
    ("make", "dim"), [(mlp, 5), (cnn, 4), (cnn, None), (gpt2, 4)], ids=["mlp", "cnn", "cnn unprojected", "gpt2"]
)
def test_shares_are_autograds_position_by_position(make: Any, dim: int | None, tmp_path: Path) -> None:
    case = make()
    case.query = split(case.query, 2)[0]
    settings = WHOLE | dict(projection_dim=dim, batch_size=5, layers=case.selection or LayerSelection())
    index = Index.build(
        tmp_path / "i", model=case.model, data=case.data, config=BuildConfig(**settings), progress=False
    )
    dense = Dense(case, index, uses_of(case))
    hits = index.search(case.query, k=3)
    found = index.explain(case.query, hits)
    check_sums(found)
    most = largest(found)
    # The curvature is kept in half precision.
    within = 1e-3 * most
    for q, row in enumerate(found):
        asked = dense.positions(case.one(case.query, q))
        for e, i, score in zip(row, hits.ids[q].tolist(), hits.scores[q].tolist(), strict=True):
            assert (e.query, e.id) == (q, i) and abs(e.stored - score) <= 1e-5 * most
            assert abs(e.difference) <= 1e-4 * most
            example = dense.positions(case.one(case.data, i))
            shares, backwards = dense.shares(example, asked), dense.shares(asked, example)
            total, lengths = 0.0, set()
            assert list(e.layers) == list(index.layers)
            for layer, modules in shares.items():
                expected = sum(modules.values())
                lengths.add(len(expected))
                assert e.layer_tokens[layer].dtype == np.float32
                assert np.abs(e.layer_tokens[layer] - expected).max() <= within, layer
                assert abs(e.layers[layer] - expected.sum()) <= within
                for module, share in modules.items():
                    assert abs(e.modules[module] - share.sum()) <= within
                total += expected.sum()
            assert abs(e.score - total) <= within
            if len(lengths) > 1:
                assert e.tokens is None and e.query_tokens is None
                continue
            assert np.abs(e.tokens - sum(sum(m.values()) for m in shares.values())).max() <= within
            assert np.abs(e.query_tokens - sum(sum(m.values()) for m in backwards.values())).max() <= within
            json.loads(json.dumps(e.to_json(), allow_nan=False))
    if make is gpt2:
        assert {"lm_head", "transformer.wte"} <= set(found[0][0].modules) and "lm_head" not in found[0][0].layers


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Index]:
    case = gpt2()
    config = BuildConfig(projection_dim=5, batch_size=16)
    path = tmp_path_factory.mktemp("explain") / "i"
    return case, Index.build(path, model=case.model, data=case.data, config=config, progress=False)


def test_shares_follow_the_search(built: tuple[Case, Index]) -> None:
    """Damping, layers, opponents, a measure; ids in any form; the stored score is the scan's."""
    case, index = built
    scores = index.scores(case.query)
    found = index.explain(case.query, [5, 0, 5], query_tokens=False)
    check_sums(found)
    assert [[e.id for e in row] for row in found] == [[5, 0, 5]] * 4
    assert found[0][0] is found[0][2] and found[0][0].query_tokens is None
    stored = np.array([[e.stored for e in row] for row in found])
    assert np.allclose(stored, scores[:, [5, 0, 5]], rtol=1e-4, atol=1e-4 * np.abs(scores).max())

    settings: dict[str, Any] = dict(damping=0.7, layers="*mlp*")
    hits = index.search(case.query, k=2, opponents=True, **settings)
    found = index.explain(case.query, hits, **settings)
    check_sums(found)
    assert {name for e in found[0] for name in e.layers} == {n for n in index.layers if "mlp" in n}
    stored = np.array([[e.stored for e in row] for row in found])
    assert np.allclose(stored, hits.scores, rtol=1e-4, atol=1e-4 * np.abs(scores).max())

    def less(model: nn.Module, batch: Any) -> torch.Tensor:
        return -2 * default_loss(model, batch)

    measured = index.explain(case.query, [1, 2], measure=less)
    plain = index.explain(case.query, [1, 2])
    check_sums(measured)
    for a, b in zip((e for row in measured for e in row), (e for row in plain for e in row), strict=True):
        for one, two in ((a.tokens, b.tokens), (a.query_tokens, b.query_tokens)):
            assert np.abs(one - 2 * two).max() <= 1e-4 * np.abs(two).max()


def test_gradients_as_a_query_and_batches_do_not_matter(built: tuple[Case, Index]) -> None:
    case, index = built
    one = {k: v[:1] for k, v in case.query.items()}
    alone = index.explain(one, [3, 11])[0]
    among = index.explain(case.query, np.array([[3, 11], [7, 9], [3, 39], [0, 1]]))[0]
    for a, b in zip(alone, among, strict=True):
        assert np.abs(a.tokens - b.tokens).max() <= 1e-4 * np.abs(a.tokens).max() and len(a.tokens) == len(b.tokens)
        assert np.abs(a.query_tokens - b.query_tokens).max() <= 1e-4 * np.abs(a.query_tokens).max()
    g = gradients_of(index, case.model, one)
    given = index.explain({name: part.numpy() for name, part in g.items()}, [3, 11])[0]
    assert [e.query_tokens for e in given] == [None, None]
    assert close(np.array([e.score for e in given]), np.array([e.score for e in alone]), 1e-4)
    # Shown positions, and those only.
    assert [len(e.tokens) for e in alone] == [int(case.data["attention_mask"][i].sum()) for i in (3, 11)]
    assert len(alone[0].query_tokens) == int(one["attention_mask"].sum())


def test_padding_on_the_left_is_cut_off(built: tuple[Case, Index]) -> None:
    case, index = built
    turned = {
        k: torch.stack([row.roll(int(10 - m.sum())) for row, m in zip(v, case.query["attention_mask"], strict=True)])
        for k, v in case.query.items()
    }
    for a, b in zip(index.explain(case.query, [4, 8]), index.explain(turned, [4, 8]), strict=True):
        for x, y in zip(a, b, strict=True):
            assert len(x.query_tokens) == len(y.query_tokens)
            assert np.abs(x.query_tokens - y.query_tokens).max() <= 1e-3 * np.abs(x.query_tokens).max()


class Loop(nn.Module):
    """A module that is called twice, and one that an example's loss may not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x)))).mean(dim=1))


def loop_case(seed: int) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(seed)
    data, query = (torch.randn(30, 4, 6), torch.randint(0, 3, (30,))), (torch.randn(2, 4, 6), torch.tensor([0, 2]))
    return Loop(), data, query


def test_calls_add_up_and_ensembles_are_means(tmp_path: Path) -> None:
    torch.manual_seed(3)
    other = Loop()
    model, data, query = loop_case(0)
    config = BuildConfig(**(WHOLE | dict(projection_dim=4)))
    parts = []
    for number, member in enumerate((model, other)):
        index = Index.build(tmp_path / str(number), model=member, data=data, config=config, progress=False)
        parts.append(index.explain(query, [2, 9]))
        check_sums(parts[-1])
        e = parts[-1][0][0]
        assert set(e.modules) == {"inner", "out"} and len(e.layer_tokens["inner"]) == 4
        assert e.tokens is None, "the head sees one position, the inner module four"
        assert abs(e.difference) < 1e-4 * largest(parts[-1])
    # Positions of a module that is called twice, against autograd.
    calls = oracle.position_gradients(
        other, (data[0][2:3].double(), data[1][2:3]), default_loss, {"inner": [("inner", False)]}, {"inner": True}
    )["inner"]["inner"]
    whole = oracle.example_gradients(
        other,
        lambda i: (data[0][2:3].double(), data[1][2:3]),
        1,
        default_loss,
        {"inner": ("inner.weight", "inner.bias", False)},
    )["inner"]
    assert np.abs(calls.sum(axis=0) - whole[0]).max() < 1e-9
    together = Index.build(tmp_path / "all", model=[model, other], data=data, config=config, progress=False)
    found = together.explain(query, [2, 9])
    check_sums(found)
    for q in range(2):
        for k in range(2):
            e = found[q][k]
            assert set(e.layers) == {"0.inner", "0.out", "1.inner", "1.out"}
            assert abs(e.difference) < 1e-4 * largest(found)
            assert {n: e.modules[n] for n in e.modules}.keys() == e.layers.keys()


class Grouped(nn.Module):
    """A convolution with groups, and a linear map at as many positions."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.inner, self.out = nn.Conv1d(12, 12, 1, groups=2), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.mix(x.transpose(1, 2))).transpose(1, 2)
        return self.out(torch.tanh(self.inner(x))).mean(dim=1)


@pytest.mark.parametrize("settings", [{}, {"curvature_rank": 9, "complement": "truncated"}], ids=str)
def test_shares_are_those_of_the_dense_inverse(settings: Any, tmp_path: Path) -> None:
    """Of a diagonal with a low-rank part, and of the latter alone, in float64; the query's shares as well."""
    torch.manual_seed(0)
    data, query = (torch.randn(60, 4, 12), torch.randint(0, 3, (60,))), (torch.randn(2, 4, 12), torch.tensor([0, 2]))
    model, config = Grouped(), BuildConfig(store="eigen", **settings)
    index = Index.build(tmp_path / "i", model=model, data=data, config=config, progress=False)
    assert {layer.share > 0 for layer in index.curvature.values()} == {not settings}
    found = index.explain(query, [3, 40])
    check_sums(found, within=1e-6)
    asked = gradients_of(index, model, query)
    examples = gradients_of(index, model, tuple(part[[3, 40]] for part in data))
    most, lam = largest(found), relative(index)
    for name in index.layers:
        expected = dense_scores(index, asked, examples, lam, [name])
        got = np.array([[e.layers[name] for e in row] for row in found])
        assert np.abs(got - expected).max() <= 1e-4 * most, name


@pytest.mark.parametrize(("store", "row_bytes"), [("eigen", 512), ("eigen", 47), ("factors", 512)])
def test_every_store_shows_what_it_scores(store: str, row_bytes: int, tmp_path: Path) -> None:
    case = gpt2()
    config = BuildConfig(projection_dim=5, store=store, coarse=None, eigen_bytes=row_bytes)
    index = Index.build(tmp_path / "i", model=case.model, data=case.data, config=config, progress=False)
    found = index.explain(case.query, [1, 2, 3])
    check_sums(found)
    stored = np.array([[e.stored for e in row] for row in found])
    expected = index.scores(case.query)[:, 1:4]
    assert np.allclose(stored, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_added_examples_and_reopened_indexes(tmp_path: Path) -> None:
    model, data, query = loop_case(1)
    later = (torch.randn(9, 4, 6), torch.randint(0, 3, (9,)))
    index = Index.build(tmp_path / "i", model=model, data=data, config=BuildConfig(batch_size=4), progress=False)
    new = index.add(later)
    index.remove([5])
    both = index.explain(query, [3, int(new[4])])
    check_sums(both)
    reopened = Index.open(tmp_path / "i", model=model)
    with pytest.raises(DataError, match="opened without them: pass data="):
        reopened.explain(query, [3])
    everything = tuple(torch.cat(pair) for pair in zip(data, later, strict=True))
    again = reopened.explain(query, [3, int(new[4])], data=everything)
    at_open = Index.open(tmp_path / "i", model=model, data=everything).explain(query, [3, int(new[4])])
    for other in (again, at_open):
        assert close(np.array([e.score for e in other[0]]), np.array([e.score for e in both[0]]), 1e-5)
    with pytest.raises(QueryError, match="no row with id 5"):
        index.explain(query, [5])
    with pytest.raises(DataError, match="examples 0 to 29, and example 34"):
        reopened.explain(query, [34], data=data)
    shuffled = tuple(t.flip(0) for t in everything)
    with pytest.raises(DataError, match=r"example 3 of the data has a squared gradient norm .* was indexed"):
        reopened.explain(query, [3, 7], data=shuffled)


def test_what_does_not_fit_is_refused(built: tuple[Case, Index], tmp_path: Path) -> None:
    case, index = built
    for ids, message in (
        (np.zeros((3, 2), dtype=np.int64), "ids are for 3 queries"),
        (np.zeros((5, 2), dtype=np.int64), "ids are for 5 queries, and there are 4"),
        (np.zeros((2, 2, 2), dtype=np.int64), "shape"),
        ([], "shape"),
        ([400], "no row with id 400"),
    ):
        with pytest.raises(QueryError, match=message):
            index.explain(case.query, ids)
    with pytest.raises(QueryError, match="opened without its model"):
        Index.open(index.path).explain(case.query, [1])
    blocks = [{"a": np.random.default_rng(0).normal(size=(20, 3, 4)).astype(np.float32)}]
    given = Index.build(tmp_path / "g", gradients=blocks, progress=False)
    with pytest.raises(QueryError, match="built from gradients"):
        given.explain({"a": np.ones((1, 3, 4), np.float32)}, [0])


def test_texts_with_their_tokens(tmp_path: Path) -> None:
    text_model = load_text_model(tiny_model_folder(tmp_path / "model"), "cpu")
    pairs = zip(SENTENCES[:7], SENTENCES[3:], strict=True)
    documents = [Document(f"{a} {b} \u2603 caf\u00e9", f"d{i}") for i, (a, b) in enumerate(pairs)]
    built = build_text_index(tmp_path / "i", text_model, documents, max_length=7, progress=False)
    index, text_model = open_text_index(tmp_path / "i")
    assert any("input_ids" in p for p in index.payloads()), "none of the windows begins within a word"
    questions = [TextQuestion(text, "Now: ").row for text in ("The dog ran over the moon.", "An owl")]
    hits = index.search(questions, k=5)
    found = index.explain(questions, hits)
    check_sums(found)
    assert [[e.id for e in row] for row in found] == hits.ids.tolist()
    asked = text_model.token_texts(questions)
    for row, payloads, words, text in zip(found, hits.payloads or [], asked, questions, strict=True):
        assert "".join(words) == text["prompt"] + text["completion"]
        for e, payload, tokens in zip(row, payloads, text_model.token_texts(payloads), strict=True):
            assert "".join(tokens) == payload["text"] and len(tokens) == len(e.tokens)
            assert len(words) == len(e.query_tokens)
    # Every passage is the one that was indexed, those whose text alone gives other tokens among them.
    every = index.explain("An owl", index.ids)
    check_sums(every)
    # An index that was just built knows its data, and where it is only opened payloads may be none.
    assert [e.score for e in built.explain("An owl", index.ids)[0]] == pytest.approx([e.score for e in every[0]])
    bare = Index.build(tmp_path / "bare", model=text_model.model, data=SENTENCES, tokenizer=text_model.tokenizer)
    assert bare.explain("An owl", [2])
    again = Index.open(tmp_path / "bare", model=text_model.model, tokenizer=text_model.tokenizer)
    with pytest.raises(DataError, match="keeps no text of example 2"):
        again.explain("An owl", [2])
    ids = text_model.tokenizer("a \u2603\u2603 b")["input_ids"]
    strings = token_strings(ids, text_model.tokenizer)
    assert "".join(strings) == "a \u2603\u2603 b" and len(strings) == len(ids)
