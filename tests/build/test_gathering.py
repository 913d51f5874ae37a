"""Gathering: gradients out of a training's own passes are those of a build, and the training is as without."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES, autograd, close, decoder_tokenizer, encoder_tokenizer, make_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from trainers import sft, trainer

from lorif_index import BuildConfig, Compute, CrossEntropy, Gathering, Index, Sample
from lorif_index.capture.along import Along
from lorif_index.capture.sources import ModelCapture
from lorif_index.errors import CaptureError, ConfigError, DataError, FingerprintError

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")

CONFIG = BuildConfig(batch_size=4, coarse=None, sample=Sample(size=4))
WHOLE = BuildConfig(projection_dim=None, projection="random", batch_size=4)


def same(one: Index, other: Index, query: Any, tolerance: float = 1e-3) -> bool:
    return close(one.scores(query), other.scores(query), tolerance)


# -- a loop of one's own


def table(rows: int = 120) -> tuple[TensorDataset, nn.Sequential]:
    torch.manual_seed(0)
    x = torch.randn(rows, 8)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    return TensorDataset(x, y), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def loader(data: TensorDataset, seed: int = 0) -> DataLoader[Any]:
    return DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(seed))


def test_a_loop_gives_the_gradients_that_a_build_computes(tmp_path: Path) -> None:
    """Also of losses that are averaged and scaled, in any order, and of copies."""
    data, model = table()
    data.tensors[0][7], data.tensors[1][7] = data.tensors[0][3], data.tensors[1][3]
    config = BuildConfig(coarse=None, sample=Sample(size=40))
    gathering = Gathering(tmp_path / "g", model=model, data=data, config=config, payloads=list(range(120)))
    for x, y in loader(data):
        with gathering.of((x, y)):
            (cross_entropy(model(x), y) * 3).backward()
        # A call beside it counts for nothing.
        model(x).sum().backward()
    assert gathering.found == 120 and gathering.trouble is None
    index = gathering.build({"run": "a"})
    assert index.metadata["gathered"] == 120 and index.metadata["run"] == "a" and len(index) == 120
    plain = Index.build(tmp_path / "p", model=model, data=data, config=config)
    asked = (data.tensors[0][:9], data.tensors[1][:9])
    assert same(index, plain, asked, 1e-4)
    assert [found.tolist() for found in index.find((asked[0][3:4], asked[1][3:4]))] == [[3, 7]]
    hits = index.search(asked, k=2)
    assert hits.payloads[0][0] == hits.ids[0, 0]


def test_steps_are_the_same_to_the_bit_and_rows_are_of_their_step(tmp_path: Path) -> None:
    def trained(gathering: Any, data: TensorDataset, model: nn.Sequential) -> nn.Sequential:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for x, y in loader(data):
            optimizer.zero_grad()
            if gathering is None:
                cross_entropy(model(x), y).backward()
            else:
                with gathering.of((x, y)):
                    cross_entropy(model(x), y).backward()
            optimizer.step()
        return model

    plain = trained(None, *table())
    data, model = table()
    config = BuildConfig(coarse=None, sample=Sample(size=40), projection="random", projection_dim=None)
    before = Index.build(tmp_path / "before", model=model, data=data, config=config)
    gathering = Gathering(tmp_path / "g", model=model, data=data, config=config)
    trained(gathering, data, model)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    index = gathering.build()
    after = Index.build(tmp_path / "after", model=model, data=data, config=config)
    # Rows are of the steps in between: what was trained on first is as before, and the question is of the end.
    first = next(iter(loader(data)))[0]
    ids = [int((data.tensors[0] == x).all(dim=1).nonzero()) for x in first]
    energies = [i._reader.store.gather(np.array(ids)) for i in (before, index, after)]
    assert not torch.equal(energies[1], energies[2])
    asked = (data.tensors[0][:9], data.tensors[1][:9])
    correlation = np.corrcoef(index.scores(asked).ravel(), after.scores(asked).ravel())[0, 1]
    assert 0.8 < correlation < 0.99999


def test_what_training_did_not_reach_is_computed(tmp_path: Path) -> None:
    data, model = table()
    config = BuildConfig(coarse=None, sample=Sample(size=40))
    plain = Index.build(tmp_path / "p", model=model, data=data, config=config)
    gathering = Gathering(tmp_path / "g", model=model, data=data, config=config)
    for number, (x, y) in enumerate(loader(data)):
        if number == 2:
            with pytest.raises(KeyboardInterrupt), gathering.of((x, y)):
                model(x)
                raise KeyboardInterrupt
        elif number == 3:
            with gathering.of((x, y)):
                # Without a backward pass there is nothing.
                model(x)
        elif number == 4:
            with gathering.of((x + 1, y)):
                # No examples of the data.
                cross_entropy(model(x + 1), y).backward()
        else:
            with gathering.of((x, y)):
                cross_entropy(model(x), y).backward()
    assert gathering.found == 120 - 3 * 16
    index = gathering.build()
    asked = (data.tensors[0][:9], data.tensors[1][:9])
    assert len(index) == 120 and same(index, plain, asked, 1e-4)


def test_disk_bounds_what_is_gathered(tmp_path: Path) -> None:
    data, model = table()
    room = BuildConfig(coarse=None, sample=Sample(size=40), compute=Compute(spool_bytes=50 * 4 * (9 * 16 + 17 * 4)))
    with pytest.warns(UserWarning, match="of 120 examples, of 848 bytes each, 50 are gathered"):
        gathering = Gathering(tmp_path / "g", model=model, data=data, config=room)
    for x, y in loader(data):
        with gathering.of((x, y)):
            cross_entropy(model(x), y).backward()
    assert gathering.found == 50
    index = gathering.build()
    plain = Index.build(tmp_path / "p", model=model, data=data, config=room)
    assert same(index, plain, (data.tensors[0][:9], data.tensors[1][:9]), 1e-4)


@pytest.mark.parametrize("smoothed", [True, False], ids=["smoothed", "weighted"])
def test_another_loss_is_not_taken_for_the_examples(smoothed: bool, tmp_path: Path) -> None:
    data, model = table()
    config = BuildConfig(coarse=None, sample=Sample(size=40))
    gathering = Gathering(tmp_path / "g", model=model, data=data, config=config)
    for number, (x, y) in enumerate(loader(data)):
        weight = None if smoothed else torch.tensor([1.0, 1.0, 1.0, 2.0])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with gathering.of((x, y)):
                cross_entropy(model(x), y, weight, label_smoothing=0.1 if smoothed else 0.0).backward()
        assert ["the training's loss is not the sum" in str(w.message) for w in caught] == ([] if number else [True])
    assert gathering.found == 0 and "label smoothing" in str(gathering.trouble)
    index = gathering.build()
    plain = Index.build(tmp_path / "p", model=model, data=data, config=config)
    assert index.metadata["gathered"] == 0 and same(index, plain, (data.tensors[0][:9], data.tensors[1][:9]), 1e-4)


def some(tmp_path: Path, **more: Any) -> tuple[Gathering, TensorDataset, Any, BuildConfig]:
    data, model = table()
    config = BuildConfig(coarse=None, sample=Sample(size=40))
    return Gathering(tmp_path / "g", model=model, data=data, config=config, **more), data, model, config


def test_one_backward_pass_of_several_batches_is_not_taken(tmp_path: Path) -> None:
    gathering, data, model, _ = some(tmp_path)
    batches = list(loader(data))
    with pytest.warns(UserWarning, match="backward pass of an earlier batch"):
        with gathering.of(batches[0]):
            first = cross_entropy(model(batches[0][0]), batches[0][1])
        with gathering.of(batches[1]):
            (first + cross_entropy(model(batches[1][0]), batches[1][1])).backward()
    assert gathering.found == 0


def test_a_weight_at_one_position_in_a_thousand_is_seen(tmp_path: Path) -> None:
    """However few positions it is at."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 12), nn.Linear(12, 40))
    x, y = torch.randint(40, (64, 100)), torch.randint(1, 40, (64, 100))
    y[5, 17] = 0
    config = BuildConfig(coarse=None, sample=Sample(size=40))
    gathering = Gathering(tmp_path / "g", model=model, data=(x, y), config=config)
    weight = torch.ones(40)
    weight[0] = 3.0
    with pytest.warns(UserWarning, match="not the sum of the examples' losses"), gathering.of((x, y)):
        cross_entropy(model(x).flatten(0, 1), y.flatten(), weight).backward()
    assert gathering.found == 0
    gathering.close()


def test_batch_norms_that_train_are_refused(tmp_path: Path) -> None:
    data, _ = table()
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    config = BuildConfig(coarse=None, sample=Sample(size=40))
    with pytest.raises(CaptureError, match="batch norms mix"):
        Gathering(tmp_path / "g", model=model.train(), data=data, config=config)
    gathering = Gathering(tmp_path / "g", model=model.eval(), data=data, config=config)
    model.train()
    x, y = next(iter(loader(data)))
    with pytest.warns(UserWarning, match="batch norms mix"), gathering.of((x, y)):
        cross_entropy(model(x), y).backward()
    assert gathering.found == 0


def test_an_example_that_comes_twice_in_a_batch_is_one(tmp_path: Path) -> None:
    gathering, data, model, config = some(tmp_path)
    x, y = data.tensors
    for places in torch.arange(120).split(20):
        twice = torch.cat([places, places[:3]])
        with gathering.of((x[twice], y[twice])):
            cross_entropy(model(x[twice]), y[twice]).backward()
    assert gathering.found == 120
    index = gathering.build()
    plain = Index.build(tmp_path / "p", model=model, data=data, config=config)
    assert len(index) == 120 and same(index, plain, (x[:9], y[:9]), 1e-4)
    index.verify()


def squared(model: Any, batch: Any) -> torch.Tensor:
    return (model(batch[0]) - batch[1].unsqueeze(1)).square().sum(dim=1)


@pytest.mark.parametrize("kind", ["own", "squared", "declared"])
def test_losses_of_ones_own(kind: str, tmp_path: Path) -> None:
    """Which take the model's output as it is."""
    loss: Any = {
        "own": lambda model, batch: cross_entropy(model(batch[0]), batch[1], reduction="none"),
        "squared": squared,
        "declared": CrossEntropy(lambda model, batch: (model(batch[0]), batch[1])),
    }[kind]
    gathering, data, model, config = some(tmp_path, loss=loss)
    for batch in loader(data):
        with gathering.of(batch):
            loss(model, batch).mean().backward()
    assert gathering.found == 120 and gathering.trouble is None
    index = gathering.build()
    plain = Index.build(tmp_path / "p", model=model, data=data, config=config, loss=loss)
    assert same(index, plain, (data.tensors[0][:9], data.tensors[1][:9]), 1e-4)


def test_an_error_of_the_users_loss_ends_the_gathering_alone(tmp_path: Path) -> None:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        return cross_entropy(model(batch[0])[model.training :], batch[1], reduction="none")

    gathering, data, model, _ = some(tmp_path, loss=loss)
    model.train()
    x, y = next(iter(loader(data)))
    with pytest.warns(UserWarning, match="gathering ends at 0 examples: ValueError"), gathering.of((x, y)):
        cross_entropy(model(x), y).backward()
    gathering.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_dies_leaves_nothing_that_was_gathered(tmp_path: Path) -> None:
    """The index says so."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)
            self.gate = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.relu(self.a(x)) + self.gate * self.b(x))

    data, model = table()[0], Gated()
    config = BuildConfig(coarse=None, sample=Sample(size=40))
    gathering = Gathering(tmp_path / "g", model=model, data=data, config=config)
    for x, y in loader(data):
        with gathering.of((x, y)):
            cross_entropy(model(x), y).backward()
    model.gate = 0.0
    with pytest.warns(UserWarning, match="left out"):
        index = gathering.build()
    assert index.metadata["gathered"] == 0 and list(index.layers) == ["a", "c"]


def test_random_generators_are_left_alone(tmp_path: Path) -> None:
    data, model = table()
    plain = DataLoader(data, batch_size=16)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    config = BuildConfig(coarse=None, sample=Sample(size=40))
    with Gathering(tmp_path / "g", model=model, data=plain, config=config):
        assert torch.equal(torch.rand(3), expected)


def test_nothing_is_left_where_a_gathering_is_given_up_or_refused(tmp_path: Path) -> None:
    gathering, data, model, config = some(tmp_path)
    assert list((tmp_path / "g").glob(".spool*")) and any(m._forward_hooks for m in model.modules())
    del gathering
    gc.collect()
    assert not list((tmp_path / "g").glob(".spool*")) and not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ConfigError, match="has no use for 120"):
        Gathering(tmp_path / "g", model=model, data=data)
    index = Index.build(tmp_path / "g", model=model, data=data, config=config)
    assert len(index) == 120
    with Gathering(tmp_path / "h", model=model, data=data, config=config) as given_up:
        pass
    with pytest.raises(ConfigError, match="has ended"):
        given_up.build()


def test_what_training_did_not_show_is_said(tmp_path: Path) -> None:
    gathering, data, model, _ = some(tmp_path)
    for number, (x, y) in enumerate(loader(data)):
        with gathering.of((x + (number == 0), y)):
            # Without a call of the module nothing is seen.
            cross_entropy(model.forward(x) if number == 1 else model(x), y).backward()
    expected = "of 88 of 120 examples were gathered: of 8 batches 1 had no pass that was seen, and 16 of their rows"
    with pytest.warns(UserWarning, match=expected):
        gathering.build()


def test_what_was_left_is_begun_anew_and_nothing_else_goes_on_with_it(tmp_path: Path) -> None:
    data, model = table()
    config = BuildConfig(coarse=None, sample=Sample(size=40))
    first = Gathering(tmp_path / "g", model=model, data=data, config=config)
    first.close()
    with pytest.raises(FingerprintError, match="gathering"):
        Index.build(tmp_path / "g", model=model, data=data, config=config)
    with torch.no_grad():
        model[0].weight.mul_(2)
    again = Gathering(tmp_path / "g", model=model, data=data, config=config)
    index = again.build()
    plain = Index.build(tmp_path / "p", model=model, data=data, config=config)
    assert same(index, plain, (data.tensors[0][:9], data.tensors[1][:9]), 1e-4)
    assert not list((tmp_path / "g").glob(".spool*"))


def test_what_cannot_be_gathered_is_refused(tmp_path: Path) -> None:
    data, model = table()
    with pytest.raises(ConfigError, match="has no use for 120 examples"):
        Gathering(tmp_path / "g", model=model, data=data)
    with pytest.raises(ConfigError, match="the one model"):
        Gathering(tmp_path / "e", model=[model], data=data)  # type: ignore[arg-type]
    with pytest.raises(DataError):
        Gathering(tmp_path / "n", model=model, data=None)
    with pytest.raises(ConfigError, match="is compiled"):
        Gathering(tmp_path / "c", model=torch.compile(model, backend="eager"), data=data)  # type: ignore[arg-type]
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    several = nn.Sequential(attention, nn.Linear(8, 4))
    config = BuildConfig(coarse=None, sample=Sample(size=40))
    x, y = torch.randn(60, 3, 8), torch.randint(4, (60, 3))
    with pytest.raises(CaptureError, match="cannot be listened to in modules of .*MultiheadAttention"):
        Gathering(tmp_path / "a", model=several, data=(x, y), config=config)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert-classifier", "llama checkpointed", "llama bfloat16"])
def test_listened_gradients_are_autograds(kind: str) -> None:
    """Of one padded batch in training mode, beside each example alone."""
    name, _, how = kind.partition(" ")
    model = make_model(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    tokenizer = encoder_tokenizer() if name.startswith("bert") else decoder_tokenizer()
    items = [torch.tensor(tokenizer(s)["input_ids"][: 9 + 4 * i]) for i, s in enumerate(SENTENCES[:3])]
    longest = max(map(len, items))
    batch = {
        "input_ids": torch.stack([nn.functional.pad(i, (0, longest - len(i)), value=1) for i in items]),
        "attention_mask": torch.stack([(torch.arange(longest) < len(i)).long() for i in items]),
    }
    classes = torch.tensor([0, 2, 1])
    batch["labels"] = (
        classes if "classifier" in name else batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    )
    taken = ModelCapture(model, WHOLE)
    along = Along(taken, None)
    if how == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with along.listening():
        along.begin(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "bfloat16"):
            (model(**batch).loss / 5).backward()
        block = along.end()
    model.eval()
    assert block is not None
    for layer in taken.specs:
        own = block.layers[layer].dense().numpy()
        for i, item in enumerate(items):
            one = {"input_ids": item} | ({"labels": classes[i]} if "classifier" in name else {})
            expected = autograd(model, one, layer)
            if how == "bfloat16":
                a, b = own[i].ravel(), expected.ravel()
                assert a @ b > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)
            else:
                assert close(own[i], expected), (layer, i)


# -- trainers


def run(folder: Path, callback: Any, model: Any, *, train: bool = True, **more: Any) -> Any:
    """At a rate of zero, if no other is given, all steps are of one model."""
    still: dict[str, Any] = dict(num_train_epochs=2, learning_rate=0.0, weight_decay=0.0)
    work = trainer(model, folder, callback, **still | more)
    if train:
        work.train()
    return work


def indexed(path: Path, **more: Any) -> Any:
    from lorif_index.text import IndexCallback

    return IndexCallback(path, config=CONFIG, gather=True, payloads=SENTENCES, **more)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"max_steps": 7},
        {"num_train_epochs": 1},
    ],
    ids=["plain", "accumulated", "checkpointed", "steps", "one epoch"],
)
def test_a_trainer_gives_the_index_of_a_build(more: dict[str, Any], tmp_path: Path) -> None:
    """At a rate of zero, so that all steps are of one model."""
    callback = indexed(tmp_path / "idx", metadata={"run": "a"})
    work = run(tmp_path, callback, make_model("llama"), **more)
    index = Index.open(callback.built[0], model=work.model, tokenizer=work.processing_class)
    # Of seven steps of five an epoch the last five are of two, and meet some examples twice.
    least = 6 if "max_steps" in more else 10
    assert least <= index.metadata["gathered"] <= len(index) == 10 and index.metadata["run"] == "a"
    assert index.metadata["step"] == work.state.global_step
    plain = Index.build(
        tmp_path / "p", model=work.model, data=SENTENCES, tokenizer=work.processing_class, config=CONFIG
    )
    assert same(index, plain, SENTENCES[3])
    assert index.search(SENTENCES[3], k=1, normalize="cosine").payloads[0][0] == SENTENCES[3]


def test_a_trainer_makes_the_same_steps(tmp_path: Path) -> None:
    """With dropout, bfloat16 and what is gathered in the last of three epochs."""
    more = dict(learning_rate=1e-2, num_train_epochs=3, bf16=True, gradient_accumulation_steps=2)
    plain = run(tmp_path / "plain", None, make_model("gpt2"), **more)
    callback = indexed(tmp_path / "idx")
    work = run(tmp_path, callback, make_model("gpt2"), **more)
    for a, b in zip(plain.model.parameters(), work.model.parameters(), strict=True):
        assert torch.equal(a, b)
    index = Index.open(callback.built[0], model=work.model, tokenizer=work.processing_class)
    assert index.metadata["gathered"] == 10
    assert index.search(SENTENCES[3], k=1, normalize="cosine").ids[0, 0] == 3


def test_a_trainers_other_loss_ends_the_gathering_and_not_the_training(tmp_path: Path) -> None:
    callback = indexed(tmp_path / "idx")
    with pytest.warns(UserWarning, match="gathering ends at 0 examples"):
        work = run(tmp_path, callback, make_model("llama"), label_smoothing_factor=0.1)
    assert work.state.global_step == 10 and len(Index.open(callback.built[0])) == 10


def test_a_trainer_whose_data_are_few_builds_at_the_end(tmp_path: Path) -> None:
    from lorif_index.text import IndexCallback

    callback = IndexCallback(tmp_path / "idx", config=BuildConfig(batch_size=4, coarse=None), gather=True)
    with pytest.warns(UserWarning, match="nothing is gathered.*has no use for 10 examples"):
        work = run(tmp_path, callback, make_model("llama"))
    index = Index.open(callback.built[0], model=work.model, tokenizer=work.processing_class)
    assert "gathered" not in index.metadata and len(index) == 10


def test_trainings_that_cannot_be_gathered_from_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gather=True is for when='end'"):
        indexed(tmp_path / "idx", when="save")
    best = dict(load_best_model_at_end=True, save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2)
    data = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]]})
    with pytest.raises(ConfigError, match="load_best_model_at_end"):
        transformers.Trainer(
            model=make_model("llama"),
            args=transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **best),
            train_dataset=data,
            eval_dataset=data,
            callbacks=[indexed(tmp_path / "idx")],
        ).train()


def test_an_interrupted_trainer_goes_on_and_other_ways_to_pass_data(tmp_path: Path) -> None:
    class Once(transformers.TrainerCallback):
        done = False

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == 8 and not self.done:
                self.done = True
                raise KeyboardInterrupt

    callback, model = indexed(tmp_path / "idx"), make_model("llama")
    work = run(tmp_path, callback, model, train=False, save_strategy="steps", save_steps=6)
    work.add_callback(Once())
    with pytest.raises(KeyboardInterrupt):
        work.train()
    work.train(resume_from_checkpoint=True)
    index = Index.open(callback.built[0], model=model, tokenizer=work.processing_class)
    assert index.metadata["gathered"] == 8 and len(index) == 10
    tokens = work.processing_class(SENTENCES, padding=True, return_tensors="pt")
    other = indexed(tmp_path / "dict", data=dict(tokens))
    run(tmp_path / "dict-out", other, model)
    assert Index.open(other.built[0]).metadata["gathered"] == 10


def test_a_callback_that_does_not_gather_passes_over_what_one_left(tmp_path: Path) -> None:
    from lorif_index.text import IndexCallback

    data, model = table()
    Gathering(tmp_path / "idx", model=model, data=data, config=BuildConfig(sample=Sample(size=40))).close()
    callback = IndexCallback(tmp_path / "idx", config=CONFIG)
    run(tmp_path, callback, make_model("llama"))
    assert len(Index.open(callback.built[0])) == 10


@pytest.mark.parametrize("rate", [0.0, 1e-2])
def test_trl_has_its_own_examples_gathered(rate: float, tmp_path: Path) -> None:
    """Its head is fused with the loss; rows are of the weights before their step."""
    rows = [{"prompt": s[:14], "completion": s[14:]} for s in SENTENCES]
    callback = indexed(tmp_path / "idx")
    more = dict(num_train_epochs=2, learning_rate=rate, gradient_accumulation_steps=2 if rate else 1)
    work = sft(datasets.Dataset.from_list(rows), tmp_path, callback, **more)
    work.train()
    index = Index.open(callback.built[0], model=work.model)
    assert index.metadata["gathered"] == 10
    told: dict[str, Any] = dict(model=work.model, tokenizer=work.processing_class)
    plain = Index.build(tmp_path / "p", data=work.train_dataset, config=CONFIG, **told)
    asked = work.train_dataset[4]
    item = {name: torch.tensor([asked[name]]) for name in ("input_ids", "labels")}
    assert rate or same(Index.open(callback.built[0], **told), plain, item)
