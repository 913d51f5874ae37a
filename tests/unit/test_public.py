"""The public surface, and the habits of the house, as tests."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import lorif_index
from lorif_index import BuildConfig, Index, text

PACKAGE = Path(lorif_index.__file__).parent

SURFACE = [
    "AbsoluteDamping",
    "BuildConfig",
    "CoarseIndex",
    "Compute",
    "CrossEntropy",
    "CurvatureRows",
    "Damping",
    "Estimate",
    "Explanation",
    "Gathering",
    "Group",
    "Groups",
    "Hits",
    "Index",
    "LayerSelection",
    "LorifError",
    "PaperDamping",
    "ProgressEvent",
    "Refine",
    "Refined",
    "RelativeDamping",
    "Reranked",
    "RowDamping",
    "Sample",
    "SearchStats",
    "Selection",
    "default_loss",
]

INDEX = {
    "build": "path model data gradients loss curvature config metadata payloads fit tokenizer distributed progress",
    "open": "path model loss data device verify damaged tokenizer distributed",
    "merge": "path indexes progress",
    "estimate": "model data gradients loss config examples batches disk payload_bytes world_size tokenizer progress",
    "search": "self query k recall rescore measure opponents contrast normalize exact rerank refine damping layers "
    "group_by lexical progress",
    "scores": "self query measure contrast damping layers normalize out gather shrink refine progress",
    "explain": "self query ids data measure damping layers query_tokens progress",
    "groups": "self query by measure contrast damping layers k shrink refine progress",
    "select": "self queries n method measure contrast damping refine progress",
    "self_influence": "self damping layers progress",
    "gradients": "self ids",
    "rebuild_coarse": "self kind query measure progress",
    "add": "self data gradients payloads tokenizer progress",
    "remove": "self ids",
    "compact": "self progress",
    "refit": "self progress",
    "refresh": "self",
    "payloads": "self ids",
    "contents": "self ids",
    "find": "self data",
    "duplicates": "self",
    "repair": "path progress",
    "verify": "self",
    "close": "self",
}

PROPERTIES = (
    "build_report bytes_per_example coarse codec config curvature curvature_age damping fingerprint generation "
    "held_ids ids layers metadata nbytes path skipped specs"
).split()

CONFIG = (
    "projection_dim projection_floor projection rank curvature curvature_rank power_iterations damping complement "
    "store eigen_bytes dtype seed layers batch_size on_nonfinite sample coarse compute"
).split()

# Rooms in the order in which data flow, and each one's modules: a module may import those before it and no others.
# "" is the package's own folder. The engine's come first; the text side stands on it, and prints: the engine knows
# nothing of it.
ENGINE = [
    ("", "version errors ranks damping"),
    ("codecs", "registry"),
    ("", "config progress markup"),
    ("linalg", "largest threads scratch"),
    ("capture", "gradients"),
    ("linalg", "precision projection sampling signs subspace"),
    ("capture", "sharded losses heads seeing data contents held attention norms layers ensemble probes spool hooks"),
    ("capture", "products eigenbases sources along"),
    ("", "tables results"),
    ("curvature", "sides fit inverse refine sketch"),
    ("storage", "scattered sealed shards store resident payloads locks manifest team home damage fitted"),
    ("codecs", "base kernel compiled bits sparse postings agreement truncation factors eigencodes"),
    (
        "search",
        "scoring rescoring coarse devices calibration missed proposers pursuit candidates rows reader shrinkage "
        "examples explain planner groups named contents whole select normalise rerank refining answer pairs",
    ),
    (
        "build",
        "encode coverage outliers spans choice inputs state sample stages candidates sizes traffic pipeline timing "
        "estimate gather",
    ),
    ("text", "documents yamlfile textquestions packed chat encoding tokenised preferences passages model words"),
    ("", "snapshot identity questions describe"),
    ("life", "candidates add remove refit merge repair writing incoming"),
    ("", "index gathering launch"),
    ("bergson", "store"),
    ("quanda", "explainer"),
]
TEXT_SIDE = [
    ("text", "callback textindex demo_model demo"),
    ("web", "visible charts explorer page report guard server"),
    ("cli", "app options settings show making shares asking keeping browsing"),
]


TEXT = [
    "DPOLoss",
    "Document",
    "IndexCallback",
    "PreferencePairs",
    "TextModel",
    "TextQuestion",
    "TokenisedData",
    "UnpackedDocuments",
    "build_text_index",
    "load_text_model",
    "open_text_index",
    "read_documents",
    "read_questions",
]


def test_surface_is_frozen() -> None:
    assert lorif_index.__all__ == SURFACE
    assert text.__all__ == TEXT
    assert all(hasattr(part, name) for part in (lorif_index, text) for name in part.__all__)
    for name, arguments in INDEX.items():
        signature = inspect.signature(
            inspect.unwrap(inspect.getattr_static(Index, name).__func__)
            if name in ("build", "open", "merge", "repair", "estimate")
            else getattr(Index, name)
        )
        assert [p for p in signature.parameters if p != "cls"] == arguments.split(), name
    public = {name for name in dir(Index) if not name.startswith("_")}
    assert public == set(INDEX) | set(PROPERTIES)
    assert list(inspect.signature(BuildConfig).parameters) == CONFIG


def test_everything_public_is_documented() -> None:
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path.name} has no docstring"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                trivial = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno <= 16  # type: ignore[operator]
                assert ast.get_docstring(node) or trivial, f"{path.name}: {node.name} has no docstring"


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """(own modules by their path in the package, others) imported when the module is imported."""
    own, others = set(), set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = path.parent.relative_to(PACKAGE).parts
                parts = [*base[: len(base) - node.level + 1], *(node.module.split(".") if node.module else [])]
                whole = PACKAGE.joinpath(*parts)
                own |= {".".join([*parts, a.name]) for a in node.names} if whole.is_dir() else {".".join(parts)}
            elif node.module:
                others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return own, others


def in_order(*sides: list[tuple[str, str]]) -> list[str]:
    return [f"{room}.{name}".lstrip(".") for side in sides for room, names in side for name in names.split()]


def test_imports_point_one_way() -> None:
    order = in_order(ENGINE, TEXT_SIDE)
    for place, name in enumerate(order):
        own, _ = imports_of(PACKAGE / f"{name.replace('.', '/')}.py")
        assert own <= set(order[:place]), f"{name} imports {own - set(order[:place])}, which comes behind it"
    there = {".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")}
    assert {name for name in there if not name.endswith(("__init__", "__main__"))} == set(order)


def test_nothing_heavy_is_imported() -> None:
    heavy = {"transformers", "datasets", "tokenizers", "sklearn", "matplotlib", "faiss", "pandas", "rich", "typer"}
    heavy |= {"starlette", "uvicorn", "jinja2", "markupsafe", "yaml", "bm25s", "quanda"}
    heavy |= {"peft", "accelerate", "h5py", "numba", "llvmlite"}
    for path in PACKAGE.rglob("*.py"):
        allowed = (
            {"rich", "typer"}
            if path.stem in (*" ".join(names for _, names in TEXT_SIDE).split(), "__main__")
            else set()
        )
        # A module of its own, which is imported when its class is asked for.
        allowed |= {"transformers"} if path.stem == "callback" else set()
        allowed |= {"quanda", "omegaconf"} if path.stem == "explainer" else set()
        # Imported when rows are scored, or read, by them.
        allowed |= {"numba", "llvmlite"} if path.stem in ("kernel", "scattered") else set()
        # The adapter alone, when a function of it is called.
        allowed |= {"faiss"} if path.stem == "coarse" else set()
        assert not imports_of(path)[1] & (heavy - allowed), path.name
    code = f"import sys, lorif_index; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_does_nothing_but_define() -> None:
    code = (
        "import logging, warnings, torch, random, os\n"
        "before = (len(logging.root.handlers), logging.root.level, torch.get_num_threads(), torch.get_rng_state().sum()"
        ", torch.get_default_dtype(), dict(os.environ), list(warnings.filters))\n"
        "import lorif_index\n"
        "after = (len(logging.root.handlers), logging.root.level, torch.get_num_threads(), torch.get_rng_state().sum()"
        ", torch.get_default_dtype(), dict(os.environ), list(warnings.filters))\n"
        "print(before == after)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True", done.stdout


def test_no_pickle_no_assert_no_logging_setup() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno} asserts"
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                assert name not in ("torch.load", "torch.save", "np.load", "numpy.load", "logging.basicConfig"), (
                    path.name
                )
        assert not imports_of(path)[1] & {"pickle", "dill", "cloudpickle", "shelve", "joblib"}, path.name


def test_the_type_checker_and_linter_are_content() -> None:
    root = PACKAGE.parent
    for command in (["mypy"], ["ruff", "check", "."]):
        done = subprocess.run([sys.executable, "-m", *command], cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
