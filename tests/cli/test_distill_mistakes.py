"""`moec distill`: what does not fit is told before any weight is read, in four lines and with status 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import moec
from moec.commands.asked import Distillation, laid_over, training_settings
from moec.errors import PlanError
from moec.ir.program import Tokenizer
from moec.plan import Distill, Train
from moec.runtime.manifest import NAME
from tests.cli.conftest import GPT, Moec

Refused = Callable[..., str]

TRAIN = '[compile]\nverify = "off"\n[train]\nsteps = 2\nbatch = 2\nsequence = 12\neval_batches = 1\n'


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to train on; tests read it and leave it alone."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("abc abd abe " * 100)
    return path


def saved_model(folder: Path, factory: str = "layers=3", **source: object) -> Path:
    """A model of three layers, compiled and saved."""
    from moec.models import open_model

    program = moec.compile(open_model(f"{GPT}?{factory}"), verify="off")
    for name, value in source.items():
        object.__setattr__(program.source, name, value)
    return program.save(folder)


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that teaches; tests read it and leave it alone."""
    return saved_model(tmp_path_factory.mktemp("teacher") / "program")


@pytest.fixture(scope="module")
def teacher(readable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with weights that cannot be read: zeros, as many as there were. Loading it fails."""
    folder = tmp_path_factory.mktemp("unreadable") / "program"
    shutil.copytree(readable, folder)
    blank(folder)
    return folder


def blank(folder: Path) -> Path:
    """Make weights unreadable, and leave their size as it was."""
    for weights in folder.glob("*.safetensors"):
        weights.write_bytes(b"\0" * weights.stat().st_size)
    return folder


def plan_file(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text)
    return path


def test_weights_that_were_edited(teacher: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    """The guard of all the others: with a plan that fits, weights are read, and these are refused."""
    plan = plan_file(tmp_path, "[student]\ndepth = 2\n" + TRAIN)
    told = refused("distill", teacher, "--plan", plan, "--data", text, "--out", tmp_path / "run")
    assert told.startswith(f"{teacher}/weights.safetensors\n  found   it was edited after saving")
    assert not (tmp_path / "run").exists()


PLANS = {
    "as deep": ("[student]\ndepth = 3\n", ["depth = 3", "the teacher has 3 layers", "fewer"]),
    "deeper": ("[student]\ndepth = 24\n", ["depth = 24", "3 layers"]),
    "out of range": ("[student]\nkeep = [0, 3]\n", ["student.keep", "layer 3", "3 layers"]),
    "as deep by importance": ('[student]\ndepth = 3\nby = "importance"\n', ["depth = 3", "3 layers"]),
    "no student": ("[distill]\nstop = 0.5\n", ["a plan without a [student] table", "--student PROGRAM"]),
    "stop": ("[student]\ndepth = 2\n[distill]\nstop = 1.5\n", ["plan.toml:4: distill.stop", "1.0 or less"]),
    "stop_step": ("[student]\ndepth = 2\n[distill]\nstop_step = 3\n" + TRAIN, ["stop_step = 3", "at most 2"]),
    "a typo": ("[student]\ndeph = 2\n", ["plan.toml:2: student.deph", "unknown key", "nearest 'depth'"]),
    "a typo in a table": ("[studnet]\ndepth = 2\n", ["plan.toml:1: studnet", "nearest 'student'"]),
    "hidden_map": (
        "[student]\ndepth = 2\n[distill]\nhidden = 1.0\nhidden_map = [0, 7]\n" + TRAIN,
        ["distill.hidden_map", "layer 7 of a teacher of 3 layers"],
    ),
    "long sequences": (
        "[student]\ndepth = 2\n[train]\nsequence = 17\n",
        ["train.sequence", "at most 16", "nearest --sequence 16"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANS)
def test_plans_that_do_not_fit(
    case: str, teacher: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    content, lines = PLANS[case]
    plan = plan_file(tmp_path, content)
    told = refused("distill", teacher, "--plan", plan, "--data", text, "--out", tmp_path / "run")
    assert [line for line in lines if line not in told] == [], told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["--stop", "1.5"], ["--stop", "stop = 1.5", "1.0 or less"]),
        (["--alpha", "-1"], ["--alpha", "0 or more"]),
        (["--temperature", "0"], ["--temperature", "more than 0"]),
        (["--steps", "0"], ["--steps", "1 or more"]),
        (["--sequence", "17"], ["at most 16", "nearest --sequence 16"]),
        (["--resume"], ["no checkpoint"]),
        (["--tmperature", "2"], ["no option '--tmperature'", "nearest '--temperature'"]),
        (["--student", "nowhere.py:gpt"], ["[student] in", "--student nowhere.py:gpt"]),
        (["--tokenizer", "nowhere.json"], ["nowhere.json", "no such file"]),
        (["--data", "nowhere.txt"], ["nowhere.txt", "no such file or folder"]),
    ],
    ids=lambda case: case[0] if case[0].startswith("--") else "",
)
def test_words_that_do_not_fit(
    words: list[str], lines: list[str], teacher: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    plan = plan_file(tmp_path, "[student]\ndepth = 2\n" + TRAIN)
    told = refused("distill", teacher, "--plan", plan, "--data", text, "--out", tmp_path / "run", *words)
    assert [line for line in lines if line not in told] == [], told
    assert not (tmp_path / "run").exists()


def test_no_plan_at_all(teacher: Path, refused: Refused) -> None:
    assert "no plan, and no --student" in refused("distill", teacher)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan that fits."""
    return plan_file(tmp_path, "[student]\ndepth = 2\n" + TRAIN)


# teachers


def test_a_teacher_that_is_a_model(plan: Path, refused: Refused) -> None:
    told = refused("distill", GPT, "--plan", plan)
    assert "no folder of a saved program" in told
    assert f"nearest moec train {GPT} --out RUN" in told


def test_a_teacher_that_is_not_there(plan: Path, tmp_path: Path, refused: Refused) -> None:
    assert "no such folder" in refused("distill", tmp_path / "gone", "--plan", plan)


def test_the_folder_of_a_run(teacher: Path, plan: Path, refused: Refused) -> None:
    assert f"nearest {teacher}" in refused("distill", teacher.parent, "--plan", plan)


@pytest.mark.parametrize(
    ("file", "change", "line"),
    [
        ("weights.safetensors", lambda data: data[:-9], "as it was saved"),
        ("program.py", lambda data: data + b"\n# mine\n", "it was edited after saving"),
        (NAME, lambda data: data.replace(b"GPT", b"TPG", 1), "an edited manifest"),
        (NAME, lambda data: data[:-40], "not the JSON that was written"),
    ],
    ids=["cut weights", "edited program", "edited manifest", "cut manifest"],
)
def test_a_damaged_teacher(
    file: str, change: Callable[[bytes], bytes], line: str, teacher: Path, plan: Path, tmp_path: Path,
    refused: Refused,
) -> None:  # fmt: skip
    folder = tmp_path / "program"
    shutil.copytree(teacher, folder)
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    told = refused("distill", folder, "--plan", plan)
    assert told.startswith(str(folder / file))
    assert line in told
    assert "trust=True" not in told


def test_a_teacher_without_weights(plan: Path, tmp_path: Path, moec_: Moec, refused: Refused) -> None:
    moec_("compile", GPT, "--meta", "--verify", "off", "--out", tmp_path / "hollow")
    assert "a program saved without weights" in refused("distill", tmp_path / "hollow", "--plan", plan)


# words of teacher, student and text


def test_a_student_with_another_vocabulary(
    teacher: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    plan = plan_file(tmp_path, TRAIN)
    words = ("--plan", plan, "--data", text, "--student", f"{GPT}?vocab=99")
    assert "a student of 99 words, and a teacher of 256" in refused("distill", teacher, *words)


def test_tokens_outside_of_the_vocabulary(text: Path, plan: Path, tmp_path: Path, refused: Refused) -> None:
    small = blank(saved_model(tmp_path / "small", "layers=3&vocab=99"))
    told = refused("distill", small, "--plan", plan, "--data", text)
    assert "token 101, and a model with 99 token values" in told


def test_another_tokenizer_than_the_teachers(
    text: Path, plan: Path, tmp_path: Path, tokenizer: Path, refused: Refused
) -> None:
    other = Tokenizer("words.json", "0123456789abcdef")
    spoken = blank(saved_model(tmp_path / "spoken", tokenizer=other))
    words = ("--plan", plan, "--data", text)
    told = refused("distill", spoken, *words)
    assert "found   none, and words.json, with which the teacher was trained, is not there" in told
    for given in ("bytes", tokenizer):
        told = refused("distill", spoken, *words, "--tokenizer", given)
        assert f"found   '{given}'" in told
        assert "needed  'words.json' (0123456789ab), with which the teacher was trained" in told


def test_another_tokenizer_than_the_students(text: Path, tmp_path: Path, refused: Refused) -> None:
    spoken = [
        blank(saved_model(tmp_path / name, tokenizer=Tokenizer(f"{name}.json", name)))
        for name in ("ours", "theirs")
    ]
    plan = plan_file(tmp_path, TRAIN)
    told = refused("distill", spoken[1], "--student", spoken[0], "--plan", plan, "--data", text)
    assert "a student trained with 'ours.json' (ours)" in told
    assert "'theirs.json' (theirs), as the teacher" in told


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of words, of the kind that users bring."""
    from tokenizers import Tokenizer as Maker
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    made = Maker(WordLevel({"abc": 0, "abd": 1, "abe": 2, "?": 3}, unk_token="?"))
    made.pre_tokenizer = Whitespace()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


# lessons on disk


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("alpha = 1.0", "how many words of each position to store"),
        ("hidden = 1.0", "hidden = 1.0 with --lessons"),
    ],
)
def test_settings_that_lessons_cannot_serve(
    setting: str, line: str, teacher: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    plan = plan_file(tmp_path, f"[student]\ndepth = 2\n[distill]\n{setting}\n" + TRAIN)
    words = ("--data", text, "--lessons", tmp_path / "lessons", "--out", tmp_path / "run")
    assert line in refused("distill", teacher, "--plan", plan, *words)
    assert not (tmp_path / "lessons").exists()


# a student of one's own


def test_a_plan_with_layers_for_a_student_that_is_saved(
    teacher: Path, readable: Path, tmp_path: Path, refused: Refused
) -> None:
    plan = plan_file(tmp_path, '[moe]\nlayers = "all"\nexperts = 2\n' + TRAIN)
    told = refused("distill", teacher, "--student", readable, "--plan", plan)
    assert "which is a saved program" in told


# runs that go on


@pytest.fixture(scope="module")
def taught(moec_: Moec, readable: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, both taught; its newest checkpoint is that of the first."""
    folder = tmp_path_factory.mktemp("taught")
    plan = plan_file(folder, "[student]\ndepth = 2\n" + TRAIN + "save_every = 1\n")
    moec_("distill", readable, "--plan", plan, "--data", text, "--out", folder / "run")
    shutil.rmtree(folder / "run" / "step-00000002")
    blank(folder / "run" / "student")
    return folder / "run"


def test_a_folder_with_another_run(taught: Path, teacher: Path, plan: Path, refused: Refused) -> None:
    told = refused("distill", teacher, "--plan", plan, "--out", taught)
    assert "a run that came to step-00000001" in told


@pytest.mark.parametrize("command", ["train", "distill"])
def test_a_run_into_a_program(command: str, teacher: Path, plan: Path, refused: Refused) -> None:
    told = refused(command, teacher, *(["--plan", plan] if command == "distill" else []), "--out", teacher)
    assert "the folder of a saved program" in told


def test_another_teacher_than_the_runs(
    taught: Path, text: Path, tmp_path: Path, plan: Path, refused: Refused
) -> None:
    """The same structure with other weights, and another structure."""
    words = ("--plan", plan, "--data", text, "--out", taught, "--resume")
    for name, factory in {"weights": "layers=3&seed=1", "program": "layers=4"}.items():
        other = blank(saved_model(tmp_path / name, factory.replace("&seed=1", "&hidden=32")))
        assert "another teacher than that of the run" in refused("distill", other, *words)


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        ("[student]\nkeep = [1]\n", "another [student]"),
        ('[student]\ndepth = 2\n[moe]\nlayers = "all"\nexperts = 2\n', "another [moe]"),
    ],
)
def test_another_student_than_the_runs(
    tables: str, line: str, taught: Path, teacher: Path, readable: Path, tmp_path: Path, refused: Refused
) -> None:
    plan = plan_file(tmp_path, tables + TRAIN)
    told = refused("distill", readable, "--plan", plan, "--out", taught, "--resume")
    assert f"{line} than the run in {taught} began with" in told


def test_a_teacher_that_is_gone_while_it_is_needed(
    taught: Path, plan: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    words = ("--plan", plan, "--data", text, "--out", taught, "--resume")
    assert "no such folder" in refused("distill", tmp_path / "gone", *words)


def test_a_run_without_its_student(
    taught: Path, readable: Path, plan: Path, tmp_path: Path, refused: Refused
) -> None:
    run = tmp_path / "run"
    shutil.copytree(taught, run)
    shutil.rmtree(run / "student")
    told = refused("distill", readable, "--plan", plan, "--out", run, "--resume")
    assert "a run without the student it began with" in told


def test_a_run_without_a_teacher(
    readable: Path, text: Path, plan: Path, tmp_path: Path, moec_: Moec, refused: Refused
) -> None:
    run = tmp_path / "run"
    moec_("train", readable, "--data", text, "--steps", 1, "--sequence", 8, "--batch", 1, "--out", run)
    told = refused("distill", readable, "--plan", plan, "--out", run, "--resume")
    assert "a run without" in told


# what was typed


def test_what_was_typed_is_typed_again() -> None:
    run = Distillation(
        "a b", "mos", ["x", "y"], None, "out", True, {"steps": 3}, True, False, 2, 1,
        student="s", lessons="l", taught={"alpha": 0.5},
    )  # fmt: skip
    assert run.words() == [
        "distill", "a b", "--plan", "mos", "--student", "s", "--lessons", "l", "--alpha", "0.5",
        "--data", "x", "--data", "y", "--steps", "3", "--out", "out", "--nproc", "2", "--max-restarts", "1",
        "--resume", "--trust",
    ]  # fmt: skip


def test_what_was_typed_is_named_as_it_was_typed() -> None:
    with pytest.raises(PlanError, match=r"^--alpha"):
        laid_over(Distill(), {"alpha": -1.0})
    with pytest.raises(PlanError, match=r"^--warmup"):
        training_settings(Train(steps=9, warmup=8), {"batch": 2, "warmup": 10})
    with pytest.raises(PlanError, match=r"^Train: accumulate"):
        training_settings(Train(batch=4, accumulate=4), {"batch": 2})


def test_a_program_remembers_its_tokenizer(
    text: Path, tokenizer: Path, tmp_path: Path, moec_: Moec, refused: Refused
) -> None:
    """Trained with one, it writes with that one; bytes are refused; its format does not matter."""
    run = tmp_path / "run"
    words = ("--data", text, "--steps", 1, "--sequence", 8, "--batch", 1, "--out", run)
    small = saved_model(tmp_path / "small", "vocab=4")
    moec_("train", small, "--tokenizer", tokenizer, *words)
    assert moec.load(run / "program").source.tokenizer.name == str(tokenizer)
    assert moec_("generate", run / "program", "--prompt", "abc abd", "-n", 2).stdout.startswith("abc abd")
    told = refused("generate", run / "program", "--prompt", "abc", "--tokenizer", "bytes")
    assert f"nearest --tokenizer {tokenizer}" in told
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=3))
    moec_("generate", run / "program", "--prompt", "abc", "-n", 1, "--tokenizer", plain)


def test_a_program_of_which_nothing_is_known(readable: Path, moec_: Moec) -> None:
    """As saved by earlier versions: no tokenizer is recorded."""
    manifest = json.loads((readable / NAME).read_text())
    assert manifest["source"]["tokenizer"] is None
    assert moec.load(readable).source.tokenizer is None
    moec_("generate", readable, "--prompt", "ab", "-n", 1)
