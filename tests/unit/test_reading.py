"""Files of strangers: each mistake and each trap in them is one sentence that names the file, in no time."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import threading
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from oneshot.checkpoint.adapters import scaling
from oneshot.checkpoint.adapters.adapter import read_adapter
from oneshot.checkpoint.disk.files import INDEX, list_tensors, read_header, read_json
from oneshot.checkpoint.loading.configs import read_config, read_generation_config, read_tokenizer
from oneshot.commandline import parse
from oneshot.data import templates
from oneshot.data.encoding import encode_prompt
from oneshot.errors import UserError
from oneshot.reading import limited, load_yaml, reading
from oneshot.report.finished import _settings
from oneshot.world.model import ALIGNED, build_tokenizer

DEEP = "[" * 200_000
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base"}


def bomb(levels: int = 9) -> str:
    """YAML of 500 bytes that stands for a thousand million values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


def says(path: Path, call) -> str:
    """The sentence of the UserError that ``call`` must raise, which names the file."""
    with pytest.raises(UserError) as error:
        call()
    said = str(error.value)
    assert str(path) in said
    assert "\n" not in said
    return said


@pytest.mark.parametrize("text", [DEEP, "{", "\x00", "é".encode("latin-1").decode("latin-1") * 3, "1" * 5000, ""])
def test_json_that_cannot_be_read_names_its_file(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    says(path, lambda: read_json(path))


@pytest.mark.parametrize(
    "error",
    [RecursionError(), KeyError("'a'"), TypeError("no"), OSError(28, "No space left"), Exception("rust"), ValueError()],
)
def test_whatever_a_library_raises_becomes_a_sentence(error):
    def call():
        with reading(Path("the file")):
            raise error

    says(Path("the file"), call)


@pytest.mark.parametrize(
    "header",
    [
        DEEP,
        '{"a": 1}',
        "[]",
        '{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        '{"__metadata__": "x", "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        '{"__metadata__": {"x": 1}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}',
        '{"a": {"dtype": "F32", "shape": {"1": 2}, "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "ODD", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_hostile_header_is_refused(header, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 4)
    says(path, lambda: read_header(path))


@pytest.mark.parametrize(
    "index",
    [
        DEEP,
        "[]",
        '{"weight_map": {"a": "x\\u0000y.safetensors"}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "\\ud800"}}',
        "7",
    ],
)
def test_a_hostile_index_is_refused(index, tmp_path):
    (tmp_path / INDEX).write_text(index)
    says(tmp_path / INDEX, lambda: list_tensors(tmp_path))


@pytest.fixture
def lora(tmp_path):
    """A function that writes an adapter with these fields in its config, or with this text as its config."""

    def write(fields):
        tensors = {
            f"base_model.model.model.layers.0.self_attn.{name}_proj.lora_{side}.weight": torch.ones(shape)
            for name in ("q", "v")
            for side, shape in (("A", (2, 4)), ("B", (4, 2)))
        }
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        text = fields if isinstance(fields, str) else json.dumps({**LORA, **fields})
        (tmp_path / "adapter_config.json").write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    "fields",
    [
        DEEP,
        "[]",
        "null",
        {"lora_alpha": None},
        {"lora_alpha": "4"},
        {"lora_alpha": True},
        {"lora_alpha": [4]},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"(": 4}},
        {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": {"q_proj": "4"}},
        {"alpha_pattern": {"a{99999999999}": 4}},
        '{"peft_type": "LORA", "lora_alpha": Infinity}',
    ],
)
def test_an_adapter_config_of_wrong_types_is_refused(fields, lora):
    folder = lora(fields)
    says(folder / "adapter_config.json", lambda: read_adapter(folder))


def test_a_pattern_that_never_ends_is_given_up(lora, monkeypatch):
    monkeypatch.setattr(scaling, "_PATTERN_SECONDS", 0.3)
    folder = lora({"alpha_pattern": {"((((l|a|y|e|r|s|[.a-z0-9_])*)*)*)*!": 4}})
    said = says(folder / "adapter_config.json", lambda: read_adapter(folder))
    assert "alpha_pattern" in said


def test_patterns_of_peft_still_count(lora):
    found = read_adapter(lora({"alpha_pattern": {r".*layers\.\d+\.self_attn\.q_proj": 8, "k_proj": 16}}))
    assert found.scaling == {"model.layers.0.self_attn.q_proj": 4.0, "model.layers.0.self_attn.v_proj": 2.0}


@pytest.mark.parametrize(
    "text", [bomb(), "seed: &a [*a]", "seed: 2020-13-45", DEEP[:800], "a: b: c", "\x00", "a: !!python/x 1"]
)
def test_settings_files_that_are_traps_are_refused(text, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    says(path, lambda: parse(["--config", str(path)], "plan"))


def test_settings_of_a_compared_run_that_are_a_trap_are_passed_over(tmp_path):
    (tmp_path / "settings.yaml").write_text(bomb())
    assert _settings(tmp_path) == {}


def test_yaml_with_some_aliases_is_read():
    text = "one: &one {a: 1, b: [2, 3]}\ntwo: *one\nthree: {<<: *one, a: 4}"
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10**(10**8) }}",
        "{{ 'x' * 4000000000 }}",
        "{{ 'x' * 40000000 }}",
        "{{ '%4000000000d' | format(1) }}",
        "{% set n = namespace(s='x') %}{% for a in range(99999) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "{{ 1/0 }}",
        "{{ messages.a.b }}",
        "{% if %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    ],
)
def test_chat_templates_that_are_traps_are_given_up(template, monkeypatch):
    monkeypatch.setattr(templates, "TEMPLATE_SECONDS", 0.3)
    monkeypatch.setattr(templates, "_TEMPLATE_MEMORY", 256 << 20)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    tokenizer.name_or_path = "the/model"
    says(Path("the/model"), lambda: encode_prompt([{"role": "user", "content": "hello"}], tokenizer))


def count_for_ever():
    with limited("Counting", seconds=0.05):
        while True:
            pass


def test_limits_end_with_the_block_and_leave_other_timers_alone():
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    others = signal.setitimer(signal.ITIMER_REAL, 600.0)
    try:
        with pytest.raises(UserError, match=r"Counting takes more than 0\.05 s"):
            count_for_ever()
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 600
        assert heard == []
        os.kill(os.getpid(), signal.SIGALRM)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *others)


def test_two_threads_leave_the_memory_that_a_process_may_take_as_it_was():
    before, began, over = resource.getrlimit(resource.RLIMIT_AS), threading.Event(), threading.Event()

    def short_of_memory():
        with limited("A template", memory=1 << 30):
            began.set()
            over.wait(10)

    thread = threading.Thread(target=short_of_memory)
    with limited("A file", memory=2 << 30):
        thread.start()
        assert began.wait(10)
    over.set()
    thread.join()
    after = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, before)  # or all later tests would run in little memory
    assert after == before


def test_in_another_thread_what_is_limited_runs():
    done = []

    def work():
        with limited("Work", seconds=5):
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", DEEP),
        ("config.json", "[]"),
        ("config.json", '{"model_type": 3}'),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}'),
        ("generation_config.json", "[]"),
        ("generation_config.json", '{"max_new_tokens": "x", "temperature": []}'),
        ("generation_config.json", '{"eos_token_id": [[]]}'),
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", DEEP),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 3}'),
    ],
)
def test_configs_and_tokenizers_of_wrong_types_name_their_folder(name, text, tmp_path):
    for path in ALIGNED.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text(text)
    read = (
        read_tokenizer if name.startswith("tok") else read_generation_config if name.startswith("gen") else read_config
    )
    says(tmp_path, lambda: read(tmp_path))
