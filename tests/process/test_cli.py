from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATIENCE, SENTENCES, tiny_model_folder, write_jsonl
from typer.testing import CliRunner

from lorif_index import AbsoluteDamping, Index, PaperDamping
from lorif_index.cli import app
from lorif_index.text import load_text_model
from lorif_index.version import VERSION

ROOT = Path(__file__).parents[2]
ASKED = "The dog looked at the moon."


def lorif(*args):
    """(exit code, stdout, stderr) of one command."""
    done = CliRunner().invoke(app, [str(a) for a in args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def document(*args):
    code, out, err = lorif(*args, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, texts and the index that `lorif build` made of them."""
    folder = tmp_path_factory.mktemp("home")
    tiny_model_folder(folder / "model")
    write_jsonl(folder / "texts.jsonl", [{"text": s, "url": f"page {i}"} for i, s in enumerate(SENTENCES)])
    options = (
        "--rank",
        "2",
        "--projection-dim",
        "8",
        "--curvature-rank",
        "full",
        "--dtype",
        "float32",
        "--store",
        "factors",
    )
    made = document(
        *("build", folder / "index", "--model", folder / "model", "--data", folder / "texts.jsonl"),
        *("--source-field", "url", *options),
    )
    (folder / "made.json").write_text(json.dumps(made))
    return folder


def test_version_and_help():
    assert lorif("--version") == (0, f"lorif {VERSION}\n", "")
    code, out, _ = lorif("--help")
    assert code == 0 and all(command in out for command in ("demo", "build", "search", "info"))


# -- build and info


def test_build_says_what_it_made(home):
    made = json.loads((home / "made.json").read_text())
    assert made == document("info", home / "index")
    assert made["examples"] == len(SENTENCES)
    assert {layer["rank"] for layer in made["layers"]} == {2}
    assert {(layer["d_in"], layer["d_out"]) for layer in made["layers"]} == {(8, 8)}
    # One probe an example, and its gradient: two rows.
    assert {layer["curvature_rank"] for layer in made["layers"]} == {2 * len(SENTENCES)}
    assert all(layer["trace_kept"] == pytest.approx(1.0, abs=1e-3) and layer["lambda"] > 0 for layer in made["layers"])
    assert made["config"]["dtype"] == "float32"
    text = made["metadata"]["text"]
    assert text["max_length"] == 32 and text["tokens"] > 10 * len(SENTENCES)
    with Index.open(home / "index") as index:
        index.verify()
        assert made["fingerprint"] == index.fingerprint
        assert made["bytes_per_example"] == index.bytes_per_example


def test_info_for_people(home):
    code, out, err = lorif("info", home / "index")
    assert (code, err) == (0, "") and len(out.splitlines()) < 25
    made = json.loads((home / "made.json").read_text())
    for shown in ("10", made["fingerprint"], f"{len(made['layers'])}, from", "store factors", "scan"):
        assert shown in " ".join(out.split())
    assert f"{made['bytes_per_example']:,} bytes an example" in out and "lorif info --all" in out
    assert f"rows keep {made['build_report']['coverage']['scores']:.0%} of what scores are made of" in out
    code, out, err = lorif("info", home / "index", "--all")
    assert (code, err) == (0, "")
    for shown in ("10", made["fingerprint"], "transformer.h.0.mlp.c_fc", "factors", "rule rows, multiple 0.03"):
        assert shown in out
    kept = made["build_report"]["coverage"]
    assert 0 < kept["tracked"] < 1 and 0 < kept["rows"] <= 1
    assert f"rows keep {kept['scores']:.0%} of what scores are made of" in out
    assert f"are tracked have {kept['tracked']:.0%} of the gradients" in " ".join(out.split())
    lines = [line.split() for line in out.partition("build report coverage")[2].splitlines()]
    assert ["tracked", f"{kept['tracked']:.4g}"] in lines and ["scores", f"{kept['scores']:.4g}"] in lines


def test_build_for_people_from_a_folder_of_texts(home, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "all.txt").write_text("\n".join(SENTENCES))
    (tmp_path / "texts" / "none.txt").write_text("")
    out_folder = tmp_path / "deep" / "index"
    options = ("--max-length", "20", "--layers", "*.mlp.*")
    code, out, err = lorif("build", out_folder, "--model", home / "model", "--data", tmp_path / "texts", *options)
    made = document("info", out_folder)
    assert (code, err) == (0, "") and re.search(rf"^examples +{made['examples']} *$", out, re.MULTILINE)
    assert [layer["name"] for layer in made["layers"]] == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
    found = document("search", out_folder, ASKED, "-k", "1000")["answers"][0]["hits"]
    assert len(found) == made["examples"] > len(SENTENCES)
    assert all(re.fullmatch(r"all\.txt, part \d+ of \d+", hit["source"]) for hit in found)
    assert not list(out_folder.parent.glob(".*"))


def test_build_from_a_saved_dataset(home, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"body": SENTENCES}).save_to_disk(str(tmp_path / "saved"))
    made = document(
        *("build", tmp_path / "index", "--model", home / "model", "--data", tmp_path / "saved"),
        *("--text-field", "body", "--damping", "absolute:0.5", "--projection-dim", "1/2"),
    )
    assert made["examples"] == len(SENTENCES)
    assert {layer["lambda"] for layer in made["layers"]} == {0.5}


# -- search


def test_search_finds_what_the_library_finds(home):
    found = document("search", home / "index", ASKED, "-k", "4")
    text_model = load_text_model(home / "model", "cpu")
    ids = torch.tensor([text_model.tokenizer(ASKED)["input_ids"]])
    with Index.open(home / "index", model=text_model.model) as index:
        hits = index.search({"input_ids": ids}, 4)
    (answer,) = found["answers"]
    assert [hit["id"] for hit in answer["hits"]] == hits.ids[0].tolist()
    np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], hits.scores[0], rtol=1e-4)
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2, 3, 4]
    for hit in answer["hits"]:
        assert hit["text"] == SENTENCES[hit["id"]] and hit["source"] == f"page {hit['id']}"
    with torch.no_grad():
        loss = text_model.model(input_ids=ids, labels=ids).loss
    assert answer["tokens"] == ids.shape[1] - 1
    assert answer["loss"] == pytest.approx(float(loss) * answer["tokens"], rel=1e-4)
    assert answer["loss_per_token"] == pytest.approx(float(loss), rel=1e-4)
    assert found["fingerprint"] == document("info", home / "index")["fingerprint"]
    assert found["stats"]["examined"] == len(SENTENCES) and found["stats"]["exact"]


def test_search_options_reach_the_index(home):
    text_model = load_text_model(home / "model", "cpu")
    ids = torch.tensor([text_model.tokenizer(ASKED)["input_ids"]])
    with Index.open(home / "index", model=text_model.model, tokenizer=text_model.tokenizer) as index:
        for options, arguments in [
            (("--opponents",), {"opponents": True}),
            (("--normalize", "relatif"), {"normalize": "relatif"}),
            (("--normalize", "cosine"), {"normalize": "cosine"}),
            (("--rerank", "6"), {"rerank": 6}),
            (("--refine", "--rerank", "4"), {"refine": True, "rerank": 4}),
            (("--damping", "10"), {"damping": 10.0}),
            (("--damping", "absolute:0.01"), {"damping": AbsoluteDamping(0.01)}),
            (("--damping", "paper:0.2"), {"damping": PaperDamping(0.2)}),
            (("--layers", "*.attn.*"), {"layers": "*.attn.*"}),
            (("--layers", "*.c_attn", "--layers", "*.c_fc"), {"layers": ["*.c_attn", "*.c_fc"]}),
        ]:
            found = document("search", home / "index", ASKED, "-k", "3", *options)["answers"][0]["hits"]
            hits = index.search({"input_ids": ids}, 3, **arguments)
            assert [hit["id"] for hit in found] == hits.ids[0].tolist(), options
            np.testing.assert_allclose([hit["score"] for hit in found], hits.scores[0], rtol=1e-4, err_msg=str(options))


def test_a_prompt_and_a_text_do_not_run_together(home):
    def ask(text, *more):
        return "search", home / "index", text, "--prompt", "The dog looked", *more

    assert document(*ask("at the moon."))["answers"] == document(*ask(" at the moon."))["answers"]
    assert "“The dog looked at the moon.”" in lorif(*ask("at the moon."))[1]
    code, out, _ = lorif("search", home / "index", "moon.", "--prompt", "The (")
    assert code == 0 and "“The (moon.”" in out


def test_texts_are_found_again_and_sources_removed(home, tmp_path):
    index = tmp_path / "index"
    rows = [{"text": s, "source": f"book {i % 3}.txt:{i}"} for i, s in enumerate(SENTENCES)]
    data = write_jsonl(tmp_path / "texts.jsonl", rows)
    code, out, _ = lorif("build", index, "--model", home / "model", "--data", data)
    assert code == 0 and "Ask: lorif search" in out and "passages of at most" not in out
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "Nobody wrote this."}, rows[7]])
    assert document("find", index, "--data", other) == {
        "passages": 2,
        "found": 1,
        "there": [{"passage": 1, "source": "book 1.txt:7", "ids": [7]}],
    }
    with pytest.warns(UserWarning, match=r"1 of the added examples are copies of others \(such as \[7, 11\]\)"):
        assert document("add", index, "--data", other)["ids"] == [10, 11]
    assert document("remove", index, "--source", "book 1.txt", "--source", "other.*")["removed"] == 5
    assert document("find", index, "--data", data)["found"] == 7
    assert lorif("remove", index, "--source", "nobody")[0] != 0
    assert lorif("remove", index)[0] == 2
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": " ".join(SENTENCES)}])
    code, out, _ = lorif("build", tmp_path / "cut", "--model", home / "model", "--data", long)
    assert code == 0 and "1 texts are" in " ".join(out.split())


def test_ranks_by_words_are_said(home):
    text_model = load_text_model(home / "model", "cpu")
    with Index.open(home / "index", model=text_model.model, tokenizer=text_model.tokenizer) as index:
        hits = index.search(ASKED, 5, lexical=True)
    found = document("search", home / "index", ASKED, "-k", "5", "--lexical")["answers"][0]["hits"]
    assert [hit["lexical"] for hit in found] == hits.lexical[0].tolist() and hits.lexical.max() > 0
    assert "by words" in lorif("search", home / "index", ASKED, "-k", "5", "--lexical")[1]
    assert "by words" not in lorif("search", home / "index", ASKED, "-k", "5")[1]


def test_a_prompt_is_not_asked_about(home):
    found = document("search", home / "index", "--prompt", "The dog looked", " at the moon.", "-k", "3")
    text_model = load_text_model(home / "model", "cpu")
    before, after = (text_model.tokenizer(t)["input_ids"] for t in ("The dog looked", " at the moon."))
    query = {
        "input_ids": torch.tensor([before + after]),
        "labels": torch.tensor([[-100] * len(before) + after]),
    }
    with Index.open(home / "index", model=text_model.model) as index:
        hits = index.search(query, 3)
    assert found["answers"][0]["tokens"] == len(after)
    assert [hit["id"] for hit in found["answers"][0]["hits"]] == hits.ids[0].tolist()
    np.testing.assert_allclose([h["score"] for h in found["answers"][0]["hits"]], hits.scores[0], rtol=1e-4)


def test_several_texts_are_several_answers(home):
    both = document("search", home / "index", ASKED, SENTENCES[3])["answers"]
    for answer, text in zip(both, [ASKED, SENTENCES[3]], strict=True):
        (alone,) = document("search", home / "index", text)["answers"]
        assert answer["text"] == text
        assert [hit["id"] for hit in answer["hits"]] == [hit["id"] for hit in alone["hits"]]


def test_questions_of_a_file_are_asked_together(home, tmp_path):
    asked = [("The dog looked", " at the moon."), ("An owl", " sang.")]
    file = write_jsonl(tmp_path / "q.jsonl", [{"prompt": prompt, "answer": answer} for prompt, answer in asked])
    found = document("search", home / "index", "--questions", file, "-k", "3")["answers"]
    told = document("explain", home / "index", "--questions", file, "-k", "1")["answers"]
    for number, (prompt, text) in enumerate(asked):
        (alone,) = document("search", home / "index", "--prompt", prompt, text, "-k", "3")["answers"]
        assert found[number].pop("place") == f"q.jsonl:{number + 1}"
        assert [hit["id"] for hit in found[number]["hits"]] == [hit["id"] for hit in alone["hits"]]
        assert found[number]["prompt"] == prompt and found[number]["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert told[number]["explanations"][0]["id"] == alone["hits"][0]["id"]
    code, out, _ = lorif("search", home / "index", "--questions", file, "-k", "1")
    assert code == 0 and "“The dog looked at the moon.”" in out
    for wrong in ((), (ASKED, "--questions", file), ("--questions", file, "--prompt", "x")):
        code, _, err = lorif("search", home / "index", *wrong)
        assert code == 2 and "--questions" in err, err


def test_search_for_people(home):
    code, out, err = lorif("search", home / "index", SENTENCES[2], "-k", "3")
    assert (code, err) == (0, "")
    assert out.count("page ") == 3 and "passages scored exactly" in out
    assert "\x1b" not in out
    (answer,) = document("search", home / "index", SENTENCES[2], "-k", "3")["answers"]
    first, second = out.splitlines()[:2]
    assert first == f"“{SENTENCES[2]}”"
    assert second == f"loss {answer['loss_per_token']:.2f} nats a token, of {answer['tokens']}"
    assert "score / 10 is by how many nats the text's loss" in " ".join(out.split())


def test_what_is_shown_cannot_steer_the_terminal(home, tmp_path):
    nasty = ["\x1b[2Jgone [bold]x[/bold] [/] " + s for s in SENTENCES]
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": t, "url": "\x1b]0;a\x07[red]"} for t in nasty])
    document("build", tmp_path / "index", "--model", home / "model", "--data", data, "--source-field", "url")
    code, out, _ = lorif("search", tmp_path / "index", ASKED)
    assert code == 0 and "\x1b" not in out and "\x07" not in out
    assert "⟨U+001B⟩[2Jgone [bold]x[/bold] [/]" in out and "⟨U+0007⟩[red]" in out


def test_index_and_model_may_move(home, tmp_path):
    shutil.copytree(home / "index", tmp_path / "moved")
    shutil.copytree(home / "model", tmp_path / "model")
    there = document("search", home / "index", ASKED)["answers"]
    assert document("search", tmp_path / "moved", ASKED)["answers"] == there
    assert document("search", tmp_path / "moved", ASKED, "--model", tmp_path / "model")["answers"] == there


def test_an_index_of_gradients_has_no_texts(tmp_path):
    blocks = [{"a": np.random.default_rng(0).normal(size=(20, 3, 4)).astype(np.float32)}]
    Index.build(tmp_path / "index", gradients=blocks, progress=False).close()
    assert document("info", tmp_path / "index")["metadata"] == {}
    code, out, err = lorif("search", tmp_path / "index", "x")
    assert (code, out) == (1, "") and "knows no model" in err


def test_an_index_from_the_library_is_asked_with_a_model(home, tmp_path):
    text_model = load_text_model(home / "model", "cpu")
    data = [{"input_ids": torch.tensor(text_model.tokenizer(s)["input_ids"])} for s in SENTENCES]
    Index.build(tmp_path / "index", model=text_model.model, data=data, progress=False).close()
    found = document("search", tmp_path / "index", ASKED, "--model", home / "model", "-k", "2")
    assert [(hit["source"], hit["text"]) for hit in found["answers"][0]["hits"]] == [(None, None)] * 2
    assert lorif("search", tmp_path / "index", ASKED, "--model", home / "model")[0] == 0


# -- an index that lives


@pytest.fixture
def living(home, tmp_path):
    shutil.copytree(home / "index", tmp_path / "index")
    return tmp_path / "index"


def test_texts_are_added_and_removed(home, living, tmp_path):
    more = "A keeper counted ships."
    write_jsonl(tmp_path / "more.jsonl", [{"text": more}])
    added = document("add", living, "--data", tmp_path / "more.jsonl")
    assert added["ids"] == [len(SENTENCES)] and added["examples"] == len(SENTENCES) + 1
    assert 0 < added["curvature_age"]["new_trace"] < 1
    found = document("search", living, more, "-k", 1)["answers"][0]["hits"][0]
    assert (found["id"], found["text"]) == (len(SENTENCES), more) and found["source"].startswith("more.jsonl")
    assert document("info", living)["curvature_age"]["new_rows"] == 1
    assert document("remove", living, 0, found["id"]) == {"removed": 2, "examples": len(SENTENCES) - 1}
    assert more.encode() in b"".join(path.read_bytes() for path in living.iterdir())
    assert lorif("compact", living)[1].startswith("bytes  ")
    assert more.encode() not in b"".join(path.read_bytes() for path in living.iterdir())
    assert "curvature" in lorif("refit", living)[1]
    assert "whole    true" in lorif("verify", living)[1] and "dropped  none" in lorif("repair", living)[1]
    code, out, err = lorif("remove", living, 0)
    assert (code, out) == (1, "") and "no row with id 0" in err


def test_damage_is_told_and_mended(living):
    shard = living / "shard-000000.h5"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    code, out, err = lorif("verify", living, "--json")
    assert code == 1 and json.loads(out)["damaged"][0]["file"] == "shard-000000.h5"
    assert "examples 0 to" in err
    code, _, err = lorif("repair", living)
    assert code == 1 and "no shard is whole" in err
    shard.write_bytes(raw)
    assert lorif("verify", living)[0] == 0


# -- what goes wrong


def changed_passages(home, tmp_path):
    shutil.copytree(home / "index", tmp_path / "index")
    path = tmp_path / "index" / "shard-000000.h5"
    path.write_bytes(path.read_bytes().replace(b" cat ", b" cot "))
    return ["search", tmp_path / "index", ASKED]


def lost_model(home, tmp_path):
    tiny_model_folder(tmp_path / "model")
    data = ["--model", tmp_path / "model", "--data", home / "texts.jsonl"]
    assert lorif("build", tmp_path / "index", *data)[0] == 0
    shutil.rmtree(tmp_path / "model")
    return ["search", tmp_path / "index", ASKED]


def build_of(rows):
    def arguments(home, tmp_path):
        write_jsonl(tmp_path / "d.jsonl", rows)
        return ["build", tmp_path / "index", "--model", home / "model", "--data", tmp_path / "d.jsonl"]

    return arguments


WRONG = {
    "no such data": (
        lambda home, tmp: ["build", tmp / "index", "--model", home / "model", "--data", tmp / "nothing"],
        "nothing does not exist",
    ),
    "no such model": (
        lambda home, tmp: ["build", tmp / "index", "--model", tmp / "nothing", "--data", home / "texts.jsonl"],
        "nothing is not a folder",
    ),
    "folder without a model": (
        lambda home, tmp: ["build", tmp / "index", "--model", home, "--data", home / "texts.jsonl"],
        "has no config.json",
    ),
    "jsonl without the field": (build_of([{"text": "fine here"}, {"body": "x"}]), "d.jsonl:2 has no field 'text'"),
    "empty texts only": (build_of([{"text": ""}, {"text": ""}]), "none of the 2 documents has a passage"),
    "no rows": (build_of([]), "none of the 0 documents has a passage"),
    "windows beyond the context": (
        lambda home, tmp: [*build_of([{"text": "x y"}])(home, tmp), "--max-length", 33],
        "max_length=33 is above the model's context of 32",
    ),
    "rank out of range": (lambda home, tmp: [*build_of([{"text": "x y"}])(home, tmp), "--rank", 0], "rank must be"),
    "no fraction": (
        lambda home, tmp: [*build_of([{"text": "x y"}])(home, tmp), "--projection-dim", "1/0"],
        "projection_dim Fraction(1, 0)",
    ),
    "unknown dtype": (lambda home, tmp: [*build_of([{"text": "x"}])(home, tmp), "--dtype", "int8"], "dtype must be"),
    "unknown device": (lambda home, tmp: [*build_of([{"text": "x"}])(home, tmp), "--device", "abacus"], "'abacus'"),
    "layers that match nothing": (
        lambda home, tmp: [*build_of([{"text": "x y"}])(home, tmp), "--layers", "nix*"],
        "nix*",
    ),
    "index exists": (
        lambda home, tmp: ["build", home / "index", "--model", home / "model", "--data", home / "texts.jsonl"],
        "already holds an index",
    ),
    "not an index": (lambda home, tmp: ["info", home / "model"], "it is not an index"),
    "nothing to open": (lambda home, tmp: ["search", tmp / "none", "x"], "none"),
    "empty text": (lambda home, tmp: ["search", home / "index", ""], "no token that has a loss"),
    "text beyond the context": (
        lambda home, tmp: ["search", home / "index", " ".join(SENTENCES)],
        "more than 32 tokens",
    ),
    "layers of another index": (
        lambda home, tmp: ["search", home / "index", ASKED, "--layers", "nix*"],
        "matches none of the index's layers",
    ),
    "another model": (
        lambda home, tmp: [
            *("search", home / "index", ASKED),
            *("--model", tiny_model_folder(tmp / "other", seed=1)),
        ],
        "differs in model",
    ),
    "changed passages": (changed_passages, "shard-000000.h5 has digest"),
    "lost model": (lost_model, "no longer at"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_line(home, tmp_path, case):
    arguments, message = WRONG[case]
    arguments = arguments(home, tmp_path)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    code, out, err = lorif(*arguments, *([] if "--json" in arguments else ["--json"]))
    assert (code, out) == (1, ""), err
    assert err.startswith("lorif: ") and err.count("\n") == 1
    assert message in err
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before, "a failed command leaves nothing behind"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["build", "x"],
        ["search", "x"],
        ["search", "x", "y", "-k", "0"],
        ["search", "x", "y", "--damping", "big"],
        ["search", "x", "y", "--damping", "-1"],
        ["search", "x", "y", "--damping", "unheard:1"],
        ["info"],
        ["info", "x", "--loud"],
    ],
)
def test_usage_errors(arguments):
    code, out, err = lorif(*arguments)
    assert (code, out) == (2, "") and err


def test_an_interruption_is_one_line_and_130(home, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lorif_index.cli.making.build_text_index", interrupted)
    arguments = ["build", tmp_path / "index", "--model", home / "model", "--data", home / "texts.jsonl"]
    assert lorif(*arguments) == (130, "", "lorif: interrupted\n")


def test_ctrl_c_while_the_demo_trains(tmp_path):
    # Told by the first report of the training, so that the signal finds it at work.
    program = (
        "import os, signal\n"
        "from lorif_index import cli\n"
        "from lorif_index.progress import Stage\n"
        "def advance(self, *args, **kwargs):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "Stage.advance = advance\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "demo", "--out", str(tmp_path / "demo")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "lorif: interrupted\n"
    assert not (tmp_path / "demo").exists()


def test_progress_is_on_stderr_of_a_terminal_only(home, tmp_path):
    command = [
        *(sys.executable, "-m", "lorif_index", "build", str(tmp_path / "index"), "--model", str(home / "model")),
        *("--data", str(home / "texts.jsonl"), "--json"),
    ]
    leader, follower = pty.openpty()
    seen = bytearray()

    def watch():
        while True:
            try:
                seen.extend(os.read(leader, 1 << 16))
            except OSError:
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=follower, env=environment, timeout=PATIENCE, check=False
    )
    os.close(follower)
    watcher.join(timeout=PATIENCE)
    os.close(leader)
    assert done.returncode == 0
    assert json.loads(done.stdout)["examples"] == len(SENTENCES)
    for stage in (b"tokenise", b"curvature", b"encode", b"/s"):
        assert stage in seen


def test_a_closed_pipe_is_no_traceback(home):
    command = [sys.executable, "-m", "lorif_index", "info", str(home / "index"), "--json"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.close()
    err = running.stderr.read()
    running.stderr.close()
    assert running.wait(timeout=PATIENCE) != 0
    assert b"Traceback" not in err
