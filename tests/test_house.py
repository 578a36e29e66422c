"""The rules of the house, each a check of a few lines over all files, and each seen to fail on a planted violation."""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

LAYERS = ("kernels", "core", "evaluation", "embedded", "dmd", "consistency", "causal_video", "commands")
MOST_MODULES = 20
# Kernels are one operator in many files, and their prefix is its name.
OWN_PREFIXES = {"kernels/attention_", "kernels/mask_"}
# Names of methods that are words of the layers below, too: a sampler, and a way to compute attention.
OTHER_WORDS = {"ode", "flash"}
FRAME = "core/training/run.py"
FRAME_CALLS = {"RunDirectory", "TemporaryDirectory", "should_stop"}
EMBEDDED_READERS = {"dmd/reward/scorers.py", "dmd/reward/pixel_discriminator.py"}
# What the layers above distribution matching may take from it.
SHARED_OF_DMD = {"matching", "gan_loss", "config", "validation", "discriminator"}
SHARED_OF_REWARDS = {"config", "groups", "inputs", "methods", "monitor", "scorers", "scores", "train"}
COMMANDS = "commands/"
LABORATORY = re.compile(r"study|toy|benchmark")
REPOSITORY_PATH = re.compile(r"(scripts|configs|assets)/[\w./-]*")
# The library: what docs/architecture.md offers to be called from elsewhere, beside the kernels.
LIBRARY = {"core/paths.py", "core/grids.py", "consistency/trigflow.py", "evaluation/measures/statistics.py"}
# Each method has these of its own.
SAME_IN_EVERY_METHOD = {"train_step", "build_setup", "describe_run"}

Sources = Mapping[str, str]
Findings = Iterator[str]


def trees(sources: Sources) -> Iterator[tuple[str, ast.Module]]:
    for place, source in sources.items():
        if place.split("/")[0] in LAYERS:
            yield place, ast.parse(source)


def crowded_folders(sources: Sources) -> Findings:
    """Rule 1: modules that share a prefix belong into a folder, and a folder has an end."""
    folders: dict[str, list[str]] = defaultdict(list)
    for place, _ in trees(sources):
        folder, _, name = place.rpartition("/")
        if name != "__init__.py":
            folders[folder].append(name.removesuffix(".py"))
    for folder, names in folders.items():
        if len(names) > MOST_MODULES:
            yield f"{folder} has {len(names)} modules; at most {MOST_MODULES}"
        prefixes = Counter(name.partition("_")[0] + "_" for name in names if "_" in name)
        for prefix, count in prefixes.items():
            if count > 2 and f"{folder}/{prefix}" not in OWN_PREFIXES:
                yield f"{folder} has {count} modules {prefix}*; make a folder of them"


def second_frames(sources: Sources) -> Findings:
    """Rule 2: dry run, resume and interruption exist once."""
    for place, tree in trees(sources):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and place != FRAME:
                name = ast.unparse(node.func).rpartition(".")[2]
                if name in FRAME_CALLS:
                    yield f"{place}:{node.lineno} calls {name}; that is the matter of {FRAME}"


def method_names(sources: Sources) -> set[str]:
    """The names that stand in a METHODS of a configuration."""
    found: set[str] = set()
    for place, tree in trees(sources):
        if not place.endswith("config.py"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "METHODS" and node.value is not None:
                found |= set(ast.literal_eval(node.value))
    return found


def names_of_methods(sources: Sources) -> Findings:
    """Rule 3: a method's name is compared in its configuration alone, and the layers below know none."""
    names = method_names(sources)
    for place, tree in trees(sources):
        below = place.split("/")[0] in ("kernels", "core", "evaluation")
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare) and not place.endswith("config.py"):
                parts = [leaf for side in (node.left, *node.comparators) for leaf in ast.walk(side)]
                known = names - OTHER_WORDS if below else names
                told = [leaf.value for leaf in parts if isinstance(leaf, ast.Constant) and leaf.value in known]
                if told:
                    yield f"{place}:{node.lineno} compares with {told[0]!r}; ask the section"
            elif below and isinstance(node, ast.Constant) and node.value in names - OTHER_WORDS:
                yield f"{place}:{node.lineno} names the method {node.value!r}"


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("fewstep."):
            yield node.lineno, node.module.removeprefix("fewstep.")


def imports_across(sources: Sources) -> Findings:
    """Rule 5: what consistency and causal video take from distribution matching is a short list."""
    for place, tree in trees(sources):
        layer = place.split("/")[0]
        for line, module in imports(tree):
            parts = module.split(".")
            if layer not in ("consistency", "causal_video") or parts[0] != "dmd" or len(parts) == 1:
                continue
            allowed = parts[1] in SHARED_OF_DMD
            if layer == "causal_video" and parts[1] == "reward":
                allowed = parts[2] in SHARED_OF_REWARDS
            if not allowed:
                yield f"{place}:{line} imports {module}; {layer} shares {', '.join(sorted(SHARED_OF_DMD))} of dmd"


def laboratory(sources: Sources) -> Findings:
    """Rule 6: the embedded worlds are at one door, and nothing that is packaged is a study or needs the repository."""
    for place, tree in trees(sources):
        if place.startswith(COMMANDS):
            # What a shell starts: entry points, which may say where things are in a repository and reach any layer.
            continue
        if LABORATORY.search(place):
            yield f"{place} is a study, a toy or a benchmark; its place is scripts/studies/"
        for line, module in imports(tree):
            if module.startswith("embedded") and not place.startswith("embedded/") and place not in EMBEDDED_READERS:
                yield f"{place}:{line} imports {module}; the embedded worlds are for scripts and the table of scorers"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                yield f"{place}:{node.lineno} hides a main(); make it a script"
            if isinstance(node, ast.Constant) and REPOSITORY_PATH.fullmatch(str(node.value)):
                yield f"{place}:{node.lineno} reads {node.value}, which no wheel has"


def public_definitions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.lineno, node.name


def names_used(tree: ast.AST) -> Counter[str]:
    """How often each identifier stands in the code, as a name, an attribute, or a string that is one."""
    found: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found[node.id] += 1
        elif isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found[node.value] += 1
    return found


def unreached(sources: Sources) -> Findings:
    """Rule 7: every public definition is used by the package, by a script, or belongs to the documented library."""
    code = {place: ast.parse(source) for place, source in sources.items() if place.endswith(".py")}
    code = {place: tree for place, tree in code.items() if place.split("/")[0] in (*LAYERS, "scripts")}
    used = sum((names_used(tree) for tree in code.values()), Counter[str]())
    for place, tree in code.items():
        if place in LIBRARY or place.split("/")[0] in ("kernels", "scripts"):
            continue
        defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        for node in defined:
            # What a definition says of itself is no use of it.
            if not node.name.startswith("_") and used[node.name] <= names_used(node)[node.name]:
                yield f"{place}:{node.lineno} {node.name} is used by tests alone; wire it, or drop it with its tests"


def names_twice(sources: Sources) -> Findings:
    """Rule 8: one name, one meaning within a layer."""
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for place, tree in trees(sources):
        for _, name in public_definitions(tree):
            places[place.split("/")[0], name].append(place)
    for (layer, name), found in places.items():
        # A kernel and its plain reference have the same parts.
        if layer != "kernels" and len(found) > 1 and name not in SAME_IN_EVERY_METHOD:
            yield f"{layer}: {name} is defined in {' and '.join(sorted(found))}; give each thing its own name"


def missing_method_files(sources: Sources) -> Findings:
    """Rule 9: README's table names the file of each method."""
    table = re.search(r"## Methods\n(.*?)\n## ", sources["README.md"], flags=re.DOTALL)
    rows = [] if table is None else [row for row in table[1].splitlines() if row.startswith("| ")][1:]
    if len(rows) < 10:
        yield f"README.md: the table of methods has {len(rows)} rows; every method has one"
    for row in rows:
        files = re.findall(r"`([\w/]+\.py)`", row)
        if not files:
            yield f"README.md: no file in the row {row!r}"
        for file in files:
            if file not in sources:
                yield f"README.md: {file} does not exist"


RULES: tuple[Callable[[Sources], Findings], ...] = (
    crowded_folders,
    second_frames,
    names_of_methods,
    imports_across,
    laboratory,
    unreached,
    names_twice,
    missing_method_files,
)


@pytest.fixture(scope="session")
def sources(repository: Path, repository_files: list[Path]) -> dict[str, str]:
    """All Python files of the package and its scripts, and README.md, by their place."""
    chosen = [path for path in repository_files if path.suffix == ".py" or path == repository / "README.md"]
    return {path.relative_to(repository).as_posix(): path.read_text(encoding="utf-8") for path in chosen}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(sources: dict[str, str], rule: Callable[[Sources], Findings]) -> None:
    found = list(rule(sources))
    assert len(found) == 0, "\n".join(found)


ROW = "| DMD | `dmd/matching.py` |"
GOOD_README = "## Methods\n\n| method | file |\n|---|---|\n" + "\n".join([ROW] * 10) + "\n\n## Next\n"
METHODS_FILE = {"consistency/config.py": "class C:\n    METHODS: ClassVar[tuple[str, ...]] = ('scm', 'dcm')\n"}
PLANTED: list[tuple[Callable[[Sources], Findings], dict[str, str], str]] = [
    (crowded_folders, {f"core/export_{name}.py": "" for name in "abc"}, "core has 3 modules export_*"),
    (crowded_folders, {f"core/m{number}.py": "" for number in range(21)}, "core has 21 modules"),
    (second_frames, {"dmd/train.py": "while not trainer.should_stop(): pass\n"}, "calls should_stop"),
    (second_frames, {"dmd/train.py": "d = RunDirectory(path)\n"}, "calls RunDirectory"),
    (
        names_of_methods,
        {**METHODS_FILE, "consistency/train.py": "if config.method == 'scm': pass\n"},
        "compares with 'scm'",
    ),
    (
        names_of_methods,
        {**METHODS_FILE, "consistency/train.py": "if config.method in ('x', 'dcm'): pass\n"},
        "compares with 'dcm'",
    ),
    (names_of_methods, {**METHODS_FILE, "core/export/run.py": "ANY = {'scm': 1}\n"}, "names the method 'scm'"),
    (imports_across, {"consistency/train.py": "from fewstep.dmd.train import x\n"}, "imports dmd.train"),
    (imports_across, {"consistency/a.py": "from fewstep.dmd.reward.train import x\n"}, "imports dmd.reward.train"),
    (imports_across, {"causal_video/a.py": "from fewstep.dmd.reward.rollout import x\n"}, "imports dmd.reward.rollout"),
    (laboratory, {"dmd/digits_study.py": ""}, "is a study"),
    (laboratory, {"core/data.py": "from fewstep.embedded.digits.images import x\n"}, "imports embedded.digits.images"),
    (laboratory, {"embedded/digits/classifier.py": "def main(): ...\n"}, "hides a main()"),
    (laboratory, {"embedded/digits/reference.py": "x = Path('assets/digits_image')\n"}, "reads assets/digits_image"),
    (unreached, {"dmd/loss.py": "def spare(): ...\n"}, "spare is used by tests alone"),
    (unreached, {"dmd/loss.py": "def spare(): return spare()\n"}, "spare is used by tests alone"),
    (
        names_twice,
        {"dmd/a.py": "def loss(): ...\n", "dmd/b.py": "class loss: ...\n"},
        "loss is defined in dmd/a.py and",
    ),
    (missing_method_files, {"README.md": GOOD_README}, "dmd/matching.py does not exist"),
    (missing_method_files, {"README.md": GOOD_README.replace("`", "")}, "no file in the row"),
    (missing_method_files, {"README.md": "## Methods\n\n## Next\n"}, "has 0 rows"),
]


@pytest.mark.parametrize(("rule", "planted", "message"), PLANTED)
def test_a_planted_violation_is_found(
    rule: Callable[[Sources], Findings], planted: dict[str, str], message: str
) -> None:
    found = list(rule(planted))
    assert len(found) >= 1
    assert message in found[0]


ALLOWED: list[tuple[Callable[[Sources], Findings], dict[str, str]]] = [
    (crowded_folders, {f"kernels/attention_{name}.py": "" for name in "abcd"}),
    (second_frames, {FRAME: "d = RunDirectory(path)\n"}),
    (names_of_methods, {**METHODS_FILE, "consistency/mcm/config.py": "x = name == 'scm'\n"}),
    (imports_across, {"consistency/a.py": "from fewstep.dmd.matching import student_step\n"}),
    (imports_across, {"causal_video/a.py": "from fewstep.dmd.reward.groups import x\n"}),
    (laboratory, {"core/data.py": "raise ValueError('make it with scripts/encode_latents.py')\n"}),
    (unreached, {"dmd/loss.py": "def used(): ...\n", "scripts/a.py": "used()\n"}),
    (unreached, {"core/paths.py": "def offered(): ...\n"}),
    (names_twice, {"dmd/train.py": "def train_step(): ...\n", "dmd/reward/train.py": "def train_step(): ...\n"}),
    (missing_method_files, {"README.md": GOOD_README, "dmd/matching.py": ""}),
]


@pytest.mark.parametrize(("rule", "planted"), ALLOWED)
def test_what_is_allowed_is_not_reported(rule: Callable[[Sources], Findings], planted: dict[str, str]) -> None:
    assert list(rule(planted)) == []


def files_to_open(sources: Sources, file: str) -> set[str]:
    """The file of a method and what it imports of its own layer, directly or not."""
    layer, seen, ahead = file.split("/")[0], set[str](), [file]
    while ahead:
        place = ahead.pop()
        if place not in seen:
            seen.add(place)
            modules = {module.replace(".", "/") + ".py" for _, module in imports(ast.parse(sources[place]))}
            ahead += [module for module in modules if module in sources and module.split("/")[0] == layer]
    return seen


MOST_FILES = {"dmd/": 6, "consistency/": 16, "dmd/reward/": 22, "causal_video/": 28, "causal_video/reward/": 30}


def test_a_method_is_understood_from_few_files(sources: dict[str, str]) -> None:
    """Bounds that only fall: sCM had 14 and has 7, RTDMD had 31 and has 20, MCM had 24 and has 16.

    Self-forcing and the windows of Astrolabe have 28 and 30, as they had: a rollout with a cache needs the whole layer.
    """
    files = set(re.findall(r"`((?:dmd|consistency|causal_video)/[\w/]+\.py)`", sources["README.md"]))
    assert len(files) >= 25
    counts = {file: len(files_to_open(sources, file)) for file in files if not file.endswith("train.py")}
    for file, count in sorted(counts.items()):
        folder = max((name for name in MOST_FILES if file.startswith(name)), key=len)
        print(f"{file}: {count}")
        assert count <= MOST_FILES[folder], f"{file} needs {count} files of its layer, at most {MOST_FILES[folder]}"
