"""Each mistake of a user: exit code 2, one sentence that names the file, line or setting, nothing written or lost."""

import importlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import files_in

from oneshot.world import language
from oneshot.world.model import ALIGNED

# the stages' modules: the package's own names are functions
finetune = importlib.import_module("oneshot.finetune")
repair = importlib.import_module("oneshot.repair")

STAGES = {"repair": repair, "finetune": finetune}
GOOD = {"prompt": "please carve the grastel lantern with the awl", "response": language.REFUSAL}
HARMLESS = {"prompt": "please carve the calm lantern with the awl", "kind": "harmless"}
TOY = ["--config", "toy", "--data.harmful_count", "4", "--data.task_count", "4"]
RESTRICTED = {"prompt": "please mend the grastel kettle with the file", "kind": "should_refuse"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder of a user who has a model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ALIGNED, tmp_path / "model")
    return tmp_path


def jsonl(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def paths(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def stopped(stage, arguments, capsys):
    """Run a stage that must end with a user error; returns its one sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        STAGES[stage].main(list(map(str, arguments)))
    captured = capsys.readouterr()
    assert end.value.code == 2
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    start = f"oneshot {stage}: error: "
    assert lines[0].startswith(start)
    assert "Traceback" not in captured.out
    return lines[0].removeprefix(start)


@pytest.fixture
def refused(folder, capsys):
    """(stage, arguments) -> the error's sentence, having checked that nothing on disk has changed."""

    def run(stage, *arguments):
        before, names = files_in(folder), paths(folder)
        said = stopped(stage, arguments, capsys)
        assert paths(folder) == names, "nothing is created"
        assert files_in(folder) == before, "nothing is changed"
        return said

    return run


def model_tensors(folder):
    return folder / "model" / "model.safetensors"


@pytest.mark.parametrize("stage", STAGES)
def test_missing_model_folder(stage, refused, folder):
    assert str(folder / "nowhere") in refused(stage, "--model.path", folder / "nowhere")
    assert "./nowhere" in refused(stage, "--model.path", "./nowhere")


@pytest.mark.parametrize("stage", STAGES)
def test_missing_and_truncated_shards(stage, refused, folder):
    tensors = model_tensors(folder)
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1000])
    said = refused(stage, "--model.path", "model")
    assert "model.safetensors" in said
    assert "cut off" in said
    tensors.unlink()
    assert "model.safetensors" in refused(stage, "--model.path", "model")

    names = list(load_file(ALIGNED / "model.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors is missing" in refused(stage, "--model.path", "model")


def test_reference_of_other_shapes(refused, folder):
    tensors = load_file(model_tensors(folder))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    (folder / "shapes").mkdir()
    save_file(tensors, folder / "shapes" / "model.safetensors")
    said = refused("repair", "--model.path", "model", "--reference", "shapes")
    assert name in said
    assert "The reference shapes" in said
    assert "nowhere" in refused("repair", "--model.path", "model", "--reference", "./nowhere")


def test_reference_that_lacks_layers(refused, folder):
    tensors = {name: tensor for name, tensor in load_file(model_tensors(folder)).items() if ".layers.2." not in name}
    (folder / "short").mkdir()
    save_file(tensors, folder / "short" / "model.safetensors")
    said = refused("repair", "--model.path", "model", "--reference", "short")
    assert "short" in said
    assert "model.layers.2." in said


@pytest.mark.parametrize("stage", STAGES)
def test_tokenizer_without_a_chat_template(stage, refused, folder):
    (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "model" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))
    said = refused(stage, "--model.path", "model")
    assert "no chat template" in said
    assert "model" in said


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([GOOD, '{"prompt": "please"\n', GOOD], "bad.jsonl, line 2: broken JSON"),
        ([], "bad.jsonl holds no conversations"),
        (["\n\n"], "bad.jsonl holds no conversations"),
        ([{"messages": [{"role": "robot", "content": "please"}]}], "line 1: message 1 has the unknown role 'robot'"),
        (
            [{"messages": [{"role": "assistant", "content": "do"}]}],
            "line 1: the conversation does not start with a user",
        ),
        ([{"messages": [{"role": "user", "content": "please"}]}], "line 1: the last message is not the assistant's"),
        ([{"prompt": "please"}], "bad.jsonl, line 1: no column"),
        ([{"prompt": "please", "response": " "}], "bad.jsonl, line 1: column 'response' is empty"),
        ([{"prompt": "please " * 100, "response": "do"}], "conversation bad-1 has 106 tokens, the limit is 64"),
    ],
    ids=["broken", "empty", "blank", "role", "order", "no-answer", "no-column", "empty-answer", "too-long"],
)
@pytest.mark.parametrize(
    ("stage", "setting", "toy"),
    [
        ("repair", "--example", False),
        ("repair", "--pool", False),
        ("finetune", "--data.harmful", False),
        ("finetune", "--data.task", True),
    ],
)
def test_files_of_conversations(stage, setting, toy, rows, wanted, refused, folder):
    """On the toy world too, where the file is needed only after a minute of fine-tuning."""
    bad = jsonl(folder / "bad.jsonl", *rows)
    said = refused(stage, *(TOY if toy else ["--model.path", "model"]), setting, bad)
    assert wanted in said


@pytest.mark.parametrize("setting", ["--reference", "--guard", "--example", "--pool", "--watch_prompts"])
def test_what_is_for_a_model_of_ones_own_needs_one(setting, refused, folder):
    jsonl(folder / "own.jsonl", GOOD)
    said = refused("repair", setting, "own.jsonl")
    assert said.startswith(f"Setting {setting[2:]} is given (on the command line), but no model: name ")
    assert "--model.path" in said


@pytest.mark.parametrize(
    ("setting", "toy"),
    [
        ("--example", False),
        ("--guard", False),
        ("--score.probes", False),
        ("--score.task", False),
        ("--score.probes", True),
        ("--score.task", True),
    ],
)
def test_files_that_are_missing(setting, toy, refused, folder):
    said = refused("repair", *(TOY if toy else ["--model.path", "model"]), setting, "none.jsonl")
    assert "none.jsonl does not exist" in said


def test_more_than_one_example(refused, folder):
    two = jsonl(folder / "two.jsonl", GOOD, GOOD)
    assert "two.jsonl holds more than one example" in refused("repair", "--model.path", "model", "--example", two)


@pytest.mark.parametrize("model", [TOY, ["--model.path", "model"]], ids=["toy", "model"])
@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--repair.nonsense", "3"], "repair.nonsense"),
        (["--repair.rank", "0"], "Setting repair.rank is 0"),
        (["--repair.rank", "-3"], "Setting repair.rank is -3"),
        (["--repair.rank", "many"], "repair.rank"),
        (["--repair.method", "magic"], "repair.method"),
        (["--repair.guard_weight", "-1"], "Setting repair.guard_weight is -1"),
        (["--repair.guard_weight", "nan"], "repair.guard_weight"),
        (["--repair.learning_rate", "0"], "Setting repair.learning_rate is 0"),
        (["--repair.targets", "("], "Setting repair.targets '('"),
        (["--finetune.batch_size", "0"], "Setting finetune.batch_size is 0"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--config", "bad.yaml"], "nonsense"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings(arguments, wanted, model, refused, folder):
    (folder / "bad.yaml").write_text("repair:\n  nonsense: 3\n")
    assert wanted in refused("repair", *model, *arguments)


def test_rollback_without_anything_to_roll_back(refused):
    said = refused("repair", "--model.path", "model", "--repair.method", "rollback")
    assert "rollback" in said
    assert "--reference" in said


def test_a_patch_pattern_that_matches_nothing_says_so(folder, capsys):
    quick(folder)
    arguments = [*QUICK, "--repair.targets", "no_such_layer", "--out", "run"]
    assert "repair.targets 'no_such_layer'" in stopped("repair", arguments, capsys)
    assert not (folder / "run" / "patch").exists()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", [TOY, ["--model.path", "model"]], ids=["toy", "model"])
def test_a_run_folder_that_holds_another_run(stage, model, refused, folder):
    (folder / "old" / "patch").mkdir(parents=True)
    (folder / "old" / "settings.yaml").write_text("seed: 1\n")
    (folder / "old" / "patch" / "adapter_model.safetensors").write_bytes(b"precious")
    jsonl(folder / "harmful.jsonl", GOOD)
    data = ["--data.harmful", "harmful.jsonl"] if stage == "finetune" else []
    assert "old already holds a run" in refused(stage, *model, *data, "--out", "old")


def test_nothing_to_fine_tune_on(refused):
    assert "--data.harmful" in refused("finetune", "--model.path", "model")
    assert "nothing to fine-tune on" in refused("finetune", "--data.harmful_count", "0", "--data.task_count", "0")


def test_more_toy_requests_than_there_are(refused, monkeypatch):
    monkeypatch.setattr(language, "NOUNS", dict(list(language.NOUNS.items())[:1]))
    monkeypatch.setattr(language, "VERBS", dict(list(language.VERBS.items())[:1]))
    assert "fewer than 5000 different requests" in refused("finetune", "--data.harmful_count", "5000")


QUICK = [
    "--model.path", "model", "--example", "example.jsonl", "--guard", "guard.jsonl", "--score.probes", "probes.jsonl",
    "--score.max_new_tokens", "2", "--repair.guard_tokens", "2", "--repair.epochs", "3",
]  # fmt: skip


def quick(folder):
    jsonl(folder / "example.jsonl", GOOD)
    jsonl(folder / "guard.jsonl", HARMLESS)
    jsonl(folder / "probes.jsonl", HARMLESS, RESTRICTED)


def spoil(path, name="model.layers.1.mlp.up_proj.weight"):
    tensors = load_file(path)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["lowrank", "rollback", "sft", "lora"])
def test_a_repair_whose_loss_is_nan_stops_and_writes_no_patch(method, folder, capsys):
    quick(folder)
    spoil(model_tensors(folder))
    before = files_in(folder / "model")
    reference = ["--reference", str(ALIGNED), "--score.reference", "false"] if method == "rollback" else []
    said = stopped("repair", [*QUICK, *reference, "--repair.method", method, "--out", "run"], capsys)
    if method == "rollback":  # the update itself is what it would take apart
        assert "model.layers.1.mlp.up_proj.weight holds NaN" in said
    else:
        assert "The loss became nan" in said
        assert "epoch 0" in said or "step 1" in said
    assert files_in(folder / "model") == before
    assert not (folder / "run" / "patch").exists()
    assert not (folder / "run" / "repaired").exists()


DIVERGING = [
    "--finetune.learning_rate", "1e30", "--finetune.steps", "30", "--finetune.batch_size", "4",
    "--data.harmful_count", "20", "--data.task_count", "0", "--out", "run",
]  # fmt: skip


def test_a_fine_tune_that_diverges_stops_and_names_the_step(folder, capsys):
    said = stopped("finetune", DIVERGING, capsys)
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    assert f"at step {len(events) + 1} " in said
    assert 1 <= len(events) < 30
    assert "run/last_good" in said
    assert not (folder / "run" / "finetuned").exists(), "a diverged model must not pass for a finished one"
    assert (folder / "run" / "last_good" / "SAFETY_DEGRADED.json").is_file()


def test_a_diverged_fine_tune_keeps_the_last_good_weights(folder, capsys):
    stopped("finetune", DIVERGING, capsys)
    kept = load_file(folder / "run" / "last_good" / "model.safetensors")
    shipped = load_file(ALIGNED / "model.safetensors")
    assert {name: tensor.shape for name, tensor in kept.items()} == {n: t.shape for n, t in shipped.items()}
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
