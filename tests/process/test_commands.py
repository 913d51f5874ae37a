"""Commands: explain, the settings of a build in flags and files, completion, and the page that lists them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import SENTENCES, tiny_model_folder, write_jsonl
from test_cli import ASKED, document, lorif
from typer.testing import CliRunner

from lorif_index import AbsoluteDamping, BuildConfig, LayerSelection
from lorif_index.cli import app
from lorif_index.cli.settings import SETTINGS, Settings, flag_of
from lorif_index.config import PARTS, CoarseIndex, Sample
from lorif_index.errors import ConfigError
from lorif_index.text import open_text_index
from scripts.cli_page import PAGE, page, program

ROOT = Path(__file__).parents[2]


def fenced(text: str, mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert found, mark
    return found[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which the commands of docs/cli.md have been run: a model, texts, settings.yaml, runs/idx."""
    folder = tmp_path_factory.mktemp("commands")
    tiny_model_folder(folder / "model")
    write_jsonl(folder / "texts.jsonl", [{"text": s} for s in SENTENCES])
    (folder / "settings.yaml").write_text(fenced(PAGE.read_text(), "config"))
    before = Path.cwd()
    os.chdir(folder)
    try:
        printed = {}
        for line in fenced(PAGE.read_text(), "commands").splitlines():
            words = shlex.split(line)
            code, out, err = lorif(*words[1:])
            assert (code, err) == (0, ""), line
            printed[words[1]] = out
    finally:
        os.chdir(before)
    (folder / "printed.json").write_text(json.dumps(printed))
    return folder


# -- the page


def test_the_page_lists_every_command_and_option():
    assert page(PAGE.read_text()) == PAGE.read_text(), "python -m scripts.cli_page"
    for name, command in program().commands.items():
        part = PAGE.read_text().partition(f"\n## lorif {name}\n")[2].partition("\n## ")[0]
        assert part, name
        shared = "as for [`lorif build`]" in part
        for parameter in command.params:
            for option in [o for o in parameter.opts if o.startswith("-")]:
                listed = re.search(rf"^\| `[^`]*{re.escape(option)}\b", part, re.MULTILINE)
                assert listed or (shared and option in [*map(flag_of, SETTINGS), "--config"]), f"{name} {option}"


def commands_in_the_docs():
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for block in re.findall(r"```(?:bash|console|sh)\n(.*?)```", path.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if "lorif" in words[:1] or (".venv/bin/lorif" in words[-3:]):
                    yield path.name, words[words.index("lorif" if "lorif" in words else ".venv/bin/lorif") + 1 :]


def test_every_command_in_the_docs_can_be_read():
    seen = set()
    for where, words in commands_in_the_docs():
        if words[0].startswith("--"):
            continue
        command = program().commands.get(words[0])
        assert command is not None, f"{where}: {words}"
        command.make_context(words[0], list(words[1:]))
        seen.add(words[0])
    assert {"demo", "build", "search", "info", "explain", "estimate", "report", "serve"} <= seen


def test_the_commands_of_the_page_do_what_their_settings_say(home):
    printed = json.loads((home / "printed.json").read_text())
    made = json.loads(printed["info"])
    config = BuildConfig.from_json(made["config"])
    assert config == BuildConfig(
        store="eigen",
        projection_dim=Fraction(1, 16),
        damping=0.3,
        layers=LayerSelection(include=("*.mlp.*",), bias=False),
        eigen_bytes=1600,  # the flag, not the file's 2048
    )
    assert [layer["name"] for layer in made["layers"]] == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
    assert "transformer.h.0.mlp.c_fc" in printed["build"] and re.search(r"codec +eigen", printed["estimate"])
    assert printed["search"].count("texts.jsonl") == 5 and printed["explain"].count("texts.jsonl") == 3


def test_questions_of_a_task_are_asked(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "capitals.yaml").write_text(fenced(PAGE.read_text(), "task"))
    write_jsonl(home / "lands.jsonl", [{"land": "France", "city": "Paris"}, {"land": "Italy", "city": "Rome"}])
    code, out, err = lorif(*shlex.split(fenced(PAGE.read_text(), "task command"))[1:])
    assert (code, err) == (0, "")
    paris, rome = json.loads(out)["answers"]
    assert paris["prompt"] == "The capital of France is" and paris["text"] == " Paris"
    assert rome["place"] == "lands.jsonl:2" and len(rome["hits"]) == 3
    rows = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(rows) == 2
    for row in rows:
        (home / "one.jsonl").write_text(row)
        assert lorif("search", "runs/idx", "--questions", "one.jsonl")[0] == 0


def test_an_index_from_python_is_opened_by_the_commands(home, monkeypatch):
    pytest.importorskip("jinja2")
    monkeypatch.chdir(home)
    text = PAGE.read_text()
    exec(compile(fenced(text, "index from python"), str(PAGE), "exec"), {})
    printed = {}
    for line in fenced(text, "commands on it").splitlines():
        words = shlex.split(line)
        code, out, err = lorif(*words[1:])
        assert (code, err) == (0, ""), line
        printed[words[1]] = out
    assert printed["search"].count("line ") == 10 and printed["explain"].count("line ") == 3
    assert SENTENCES[3] in (home / "row.html").read_text()
    # What the table says of `add`, and of rows without gradients.
    code, _, err = lorif("add", "runs/own", "--data", "texts.jsonl", "--model", "model")
    assert code == 1 and "use Index.add" in err
    for refused in (("search", "runs/own", ASKED), ("explain", "runs/own", ASKED)):
        code, _, err = lorif(*refused)
        assert code == 1 and "pass --model" in err


def test_the_example_of_texts_runs(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    write_jsonl(home / "more.jsonl", [{"text": "The dog ran over the moon."}])
    names = {}
    exec(compile(fenced((ROOT / "docs" / "api.md").read_text(), "example: texts"), "api.md", "exec"), names)
    with names["index"] as index:
        assert len(index) == len(SENTENCES) and index.ids[-1] == len(SENTENCES)
    first, second = capsys.readouterr().out.splitlines()
    assert first.count("texts.jsonl:") == 3 and "".join(text for text, _ in eval(second)) in SENTENCES
    ((tokens, loss),) = names["text_model"].losses(names["question"])
    assert tokens > 0 and first.startswith(f"[({tokens}, {loss})]")


# -- explain


def test_explain_says_what_the_library_says(home):
    index, _ = open_text_index(home / "runs/idx", device="cpu")
    with index:
        expected = index.explain(ASKED, [2, 7], layers=["*.c_fc"], damping=0.5)[0]
        best, worst = (index.search(ASKED, k, opponents=k == 2).ids[0].tolist() for k in (3, 2))
    options = (ASKED, "--id", 2, "--id", 7, "--layers", "*.c_fc", "--damping", "0.5")
    found = document("explain", home / "runs/idx", *options)
    assert found["opponents"] is False and found["answers"][0]["text"] == ASKED
    for one, e in zip(found["answers"][0]["explanations"], expected, strict=True):
        assert one["id"] == e.id and one["text"] == SENTENCES[one["id"]]
        np.testing.assert_allclose(one["tokens"], e.tokens, rtol=1e-4, atol=1e-9)
        assert "".join(one["texts"]) == SENTENCES[one["id"]] and len(one["query_texts"]) == len(one["query_tokens"])
        assert sum(one["tokens"]) == pytest.approx(one["score"], rel=1e-4, abs=1e-7)
    for arguments, ids in ((("-k", 3), best), (("-k", 2, "--opponents"), worst)):
        found = document("explain", home / "runs/idx", ASKED, *arguments)
        assert [one["id"] for one in found["answers"][0]["explanations"]] == ids


def part_of(share, score):
    """In per cent, or where that would say nothing as it is."""
    return f"{share / abs(score):+.0%}" if abs(share) < 10 * abs(score) else f"{share:+.3g}"


def test_explain_for_people(home):
    code, out, err = lorif("explain", home / "runs/idx", ASKED, "--id", 3)
    assert (code, err) == (0, "") and "\x1b" not in out
    assert SENTENCES[3] in " ".join(out.split()) and "3  score " in out and "from its stored row" in out
    shares = document("explain", home / "runs/idx", ASKED, "--id", 3)["answers"][0]["explanations"][0]
    place = int(np.argmax(np.abs(shares["tokens"])))
    assert f"“{shares['texts'][place]}” {part_of(shares['tokens'][place], shares['score'])}" in out
    layer = max(shares["layers"].values(), key=abs)
    assert part_of(layer, shares["score"]) in out.partition("  layers")[2]


def test_explained_texts_cannot_steer_the_terminal(home, tmp_path, monkeypatch):
    # In colour, so that what is ours and what is theirs are told apart: ours are SGR sequences alone.
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": f"\x1b[2J[bold]x[/] [/nix] \u202e {s}"} for s in SENTENCES])
    document("build", tmp_path / "index", "--model", home / "model", "--data", data)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    code, out, _ = lorif("explain", tmp_path / "index", ASKED, "--id", 0)
    assert code == 0 and re.search(r"\x1b\[[\d;]*48;", out), "no shade"
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert "\x1b" not in plain and "\u202e" not in plain
    assert "⟨U+001B⟩[2J[bold]x[/] [/nix] ⟨U+202E⟩" in " ".join(plain.split())


@pytest.mark.parametrize(
    "options, message",
    [(("--id", 99), "no row with id 99"), (("--damping", "0.1", "--layers", "nix*"), "matches none")],
)
def test_explain_fails_in_one_line(home, options, message):
    code, out, err = lorif("explain", home / "runs/idx", ASKED, *options)
    assert (code, out) == (1, "") and err.count("\n") == 1 and message in err


def test_report_says_as_json_what_it_wrote(home, tmp_path):
    pytest.importorskip("jinja2")
    said = document("report", home / "runs/idx", "--query", ASKED, "-k", 2, "-o", tmp_path / "page.html")
    assert said == {"page": str(tmp_path / "page.html"), "bytes": (tmp_path / "page.html").stat().st_size}


# -- settings


def test_settings_are_all_of_build_config():
    wanted = []
    for f in dataclasses.fields(BuildConfig):
        parts = [f"{f.name}.{p.name}" for p in dataclasses.fields(PARTS[f.name][0])] if f.name in PARTS else [f.name]
        wanted += parts
    assert set(SETTINGS) == set(wanted)
    assert [flag_of(name) for name in ("sample.size", "coarse.kind", "compute.shard_bytes", "eigen_bytes")] == [
        *("--sample-size", "--coarse-kind", "--shard-bytes", "--eigen-bytes")
    ]


def test_defaults_that_are_written_are_the_configs():
    """Where one is not shown as it is, what is shown reads as it."""
    config = BuildConfig()
    for name, setting in SETTINGS.items():
        if setting.default is not None and name not in ("layers", "compute.device"):
            found = config
            for part in name.split("."):
                found = getattr(found, part)
            assert setting.parse(setting.default) == found, name


def test_flags_and_file_spell_the_same(home, tmp_path):
    """Every setting, in a value that is not the default, as a flag and as a line."""
    written = {
        "projection_dim": ("1/2", Fraction(1, 2)),
        "projection_floor": ("8", 8),
        "projection": ("random", "random"),
        "rank": ("full", None),
        "curvature": ("empirical", "empirical"),
        "curvature_rank": ("full", None),
        "power_iterations": ("3", 3),
        "damping": ("absolute:1e-3", AbsoluteDamping(1e-3)),
        "complement": ("truncated", "truncated"),
        "store": ("factors", "factors"),
        "eigen_bytes": ("99", 99),
        "dtype": ("float32", "float32"),
        "batch_size": ("7", 7),
        "seed": ("5", 5),
        "on_nonfinite": ("skip", "skip"),
        "layers": ("*.mlp.*", LayerSelection(include=("*.mlp.*",))),
        "sample.size": ("99", 99),
        "sample.rows": ("stored", "stored"),
        "sample.probes": ("2", 2),
        "coarse.kind": ("flat", "flat"),
        "coarse.dim": ("9", 9),
        "coarse.sketch": ("per-layer", "per-layer"),
        "coarse.queries": ("0", 0),
        "compute.device": ("cpu", "cpu"),
        "compute.autocast": ("bfloat16", "bfloat16"),
        "compute.shard_bytes": ("2MiB", 2 << 20),
        "compute.spool_bytes": ("3GB", 3 * 10**9),
    }
    assert set(written) == set(SETTINGS)
    values, lines = {}, {}
    for name, (text, value) in written.items():
        part, _, field = name.rpartition(".")
        line = f"{field}: '{text}'\n" if "*" in text else f"{field}: {text}\n"
        lines[part] = lines.get(part, "") + (f"  {line}" if part else line)
        if name != "compute.device":
            (values.setdefault(part, {}) if part else values)[field] = value
    expected = BuildConfig(**values)
    file = tmp_path / "all.yaml"
    file.write_text("".join(f"{part}:\n{body}" if part else body for part, body in lines.items()))
    assert Settings(file, {}).read() == (expected, "cpu")
    flags = [word for name, (text, _) in written.items() for word in (flag_of(name), text)]
    made = document("build", tmp_path / "index", "--model", home / "model", "--data", home / "texts.jsonl", *flags)
    assert BuildConfig.from_json(made["config"]) == expected


def test_flags_win_over_the_file_field_by_field(tmp_path):
    (tmp_path / "f.yaml").write_text("sample: 50\ncoarse: null\ncompute: {autocast: bfloat16, device: cpu}\nseed: 3")
    flags = {"sample.probes": "2", "coarse.dim": "9", "compute.autocast": "none", "seed": "4"}
    assert Settings(tmp_path / "f.yaml", flags).read() == (
        BuildConfig(sample=Sample(size=50, probes=2), coarse=CoarseIndex(kind="none", dim=9), seed=4),
        "cpu",
    )


@pytest.mark.parametrize(
    "text, values",
    [
        ("", {}),
        ("rank: null\ncoarse: null\nseed: 3", {"rank": None, "coarse": None, "seed": 3}),
        ("sample: 9\ncoarse: {dim: 4}", {"sample": 9, "coarse": {"dim": 4}}),
        ("compute: {spool_bytes: 1MiB, autocast: none}", {"compute": {"spool_bytes": 1 << 20, "autocast": None}}),
        ("damping: {rule: absolute, lam: 0.5}", {"damping": AbsoluteDamping(0.5)}),
        ("layers: ['a', 'b']", {"layers": ["a", "b"]}),
        ("projection_dim: 0.25", {"projection_dim": 0.25}),
    ],
)
def test_a_file_is_read_as_it_is_written(tmp_path, text, values):
    (tmp_path / "f.yaml").write_text(text)
    assert Settings(tmp_path / "f.yaml", {}).read() == (BuildConfig(**values), "auto")


@pytest.mark.parametrize(
    "text, message",
    [
        ("eigen_byte: 3", "unknown BuildConfig keys ['eigen_byte']"),
        ("layers: {exclud: [a]}", "unexpected keyword argument 'exclud'"),
        ("qqqq: 3", "known are ['batch_size'"),
        ("sample: {sise: 3}", "unknown keys ['sise'] of sample"),
        ("coarse: IVF64", "kind must be one of"),
        ("3: 4", "unknown BuildConfig keys ['3']"),
        ("- rank", "holds a list"),
        ("seed: 1\nseed: 2", "seed is there twice"),
        ("coarse: {dim: 8, dim: 9}", "coarse: dim is there twice"),
        ("rank: [", "is not YAML"),
        ("rank: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("rank: some", "rank must be"),
        ("rank: 0", "rank must be"),
        ("compute: {shard_bytes: lots}", "compute.shard_bytes takes bytes"),
        ("damping: {rule: nix}", "unknown damping rule 'nix'"),
        ("damping: {rule: [a]}", "with "),
        ("projection_dim: {fraction: [1, 0]}", "with "),
        ("layers: {include: 3}", "layers"),
    ],
)
def test_a_file_that_is_wrong_fails_before_anything_is_written(home, tmp_path, text, message):
    (tmp_path / "f.yaml").write_text(text)
    command = ("build", tmp_path / "index", "--model", home / "model", "--data", home / "texts.jsonl")
    code, out, err = lorif(*command, "--config", tmp_path / "f.yaml")
    assert (code, out) == (1, "") and err.count("\n") == 1, err
    assert message in err and "f.yaml" in err and not (tmp_path / "index").exists()
    with pytest.raises(ConfigError):
        Settings(tmp_path / "f.yaml", {}).read()


def test_a_lost_file_is_one_line(tmp_path):
    code, _, err = lorif("estimate", "--model", "m", "--data", "d", "--config", tmp_path / "none.yaml")
    assert code == 1 and "none.yaml" in err and err.count("\n") == 1


# -- completion


def test_completion_knows_commands_options_and_values():
    def completed(words: str) -> list[str]:
        asked = {"_LORIF_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = CliRunner().invoke(app, [], prog_name="lorif", env=asked)
        assert done.stderr == ""
        return done.stdout.split()

    assert completed("lorif ex") == ["explain"]
    assert completed("lorif build --sto") == ["--store"]
    assert "--install-completion" in lorif("--help")[1]
