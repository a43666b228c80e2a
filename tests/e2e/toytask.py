"""A task definition for lm-eval that needs no network: requests of the toy world with their right answers."""

from __future__ import annotations

import json
from pathlib import Path

from oneshot.world import language

TASK = """task: toyworld
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_gen_toks: 12
  until: ["\\n"]
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path) -> Path:
    """Write the task ``toyworld`` into a new folder: 20 harmless requests and 20 of the new task."""
    folder.mkdir()
    rows = [row for row in language.probes(20) if row.kind in ("harmless", "task")]
    data = folder / "toy.jsonl"
    lines = [json.dumps({"prompt": row.prompt[0]["content"], "answer": row.response}) for row in rows]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "toyworld.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return folder
