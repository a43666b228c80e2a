"""What is expected of each cell of the matrix: the refusals, word by word as they begin or as a pattern, and what no
patch touches. ``docs/models.md`` is written from it: ``python tests/models/expected.py --write``."""

from __future__ import annotations

import sys
from pathlib import Path

import architectures

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

CONV1D = "No linear layer to patch: .* are no nn.Linear"
NO_PATCH = "There is no patch to export"

# of (architecture, cell); every other cell works
REFUSED: dict[tuple[str, str], str] = {
    **{("gpt2", cell): CONV1D for cell in ("rollback", "lowrank", "undo")},
    ("gpt2", "nf4"): "The model has no linear layer that can be quantized",
    ("gpt2", "export"): NO_PATCH,
}

# classes of the modules that hold weight matrices and that no patch touches
LEFT_OUT: dict[str, set[str]] = {
    "bamba": {"Conv1d"},
    "falcon_h1": {"Conv1d", "out_proj"},
    "lfm2": {"Conv1d"},
    "mamba2": {"Conv1d", "out_proj"},
    "qwen3_5_text": {"Conv1d"},
    "deepseek_v3": {"DeepseekV3TopkRouter"},
    "glm4_moe": {"Glm4MoeTopkRouter"},
    "gpt_oss": {"GptOssTopKRouter"},
    "granitemoehybrid": {"Conv1d", "GraniteMoeHybridTopKRouter"},
    "jamba": {"Conv1d", "JambaMambaMixer", "JambaTopKRouter", "dt_proj"},
    "lfm2_moe": {"Conv1d", "Lfm2MoeTopKRouter"},
    "llama4_text": {"router"},
    "mixtral": {"MixtralTopKRouter"},
    "nemotron_h": {"Conv1d", "out_proj", "NemotronHTopkRouter"},
    "olmoe": {"OlmoeTopKRouter"},
    "qwen2_moe": {"Qwen2MoeTopKRouter"},
    "qwen3_moe": {"Qwen3MoeTopKRouter"},
    "qwen3_next": {"Conv1d", "Qwen3NextTopKRouter"},
    "qwen3_5_moe_text": {"Conv1d", "Qwen3_5MoeTopKRouter"},
    "gemma3": {"Gemma3MultiModalProjector", "SiglipVisionModel"},
    "gemma4": {"Gemma4MultimodalEmbedder", "Gemma4VisionModel"},
    "llama4": {"Llama4MultiModalProjector", "router", "Llama4VisionModel"},
    "mistral3": {"Mistral3MultiModalProjector", "PixtralVisionModel"},
    "qwen2_5_vl": {"Qwen2_5_VisionTransformerPretrainedModel"},
    "qwen3_vl": {"Qwen3VLVisionModel"},
    "qwen3_vl_moe": {"Qwen3VLMoeTextTopKRouter", "Qwen3VLMoeVisionModel"},
    "qwen3_5": {"Conv1d", "Qwen3_5VisionModel"},
    "qwen3_5_moe": {"Conv1d", "Qwen3_5MoeTopKRouter", "Qwen3_5MoeVisionModel"},
}

SAYS = {  # what a refusal means to a reader of the page
    CONV1D: "its layers are Conv1D, not linear: fine-tune and score it, but there is no repair",
    "The model has no linear layer that can be quantized": "its layers are Conv1D, not linear",
    NO_PATCH: "no repair, so no patch",
}
COLUMNS = ("inspect", "verify", "plan", "score", "rollback", "lowrank", "full", "lora", "nf4", "undo", "export")
KINDS = {
    "Dense": architectures.DENSE, "Hybrids": architectures.HYBRID, "Mixtures of experts": architectures.MIXTURE,
    "Multimodal": architectures.MULTIMODAL,
}  # fmt: skip
INTRODUCTION = """\
# Models

What works with which architecture, at tiny sizes with random weights. `tests/models/test_matrix.py` runs every cell of
these tables with the transformers, PEFT and torch of `constraints.txt`, and fails where one of them is not as it stands
here; `python tests/models/expected.py --write` writes this page.

A name is the `model_type` in config.json; `-tied` shares embedding and head. A multimodal checkpoint is loaded as the
class that serves it; a patch changes its language part alone, and a full fine-tune keeps the bytes of its towers.

| column | what holds |
|---|---|
| inspect, verify, plan, score | the commands |
| rollback, lowrank | a repair: the patch in plain PEFT is the merged checkpoint to 1e-5, which holds every tensor |
| full | a fine-tune of all weights: every tensor of the file is there afterwards, towers byte for byte |
| lora | a LoRA fine-tune: plain PEFT loads every factor |
| nf4 | a repair on weights in 4 bits |
| undo | rollback with full rank and all coefficients 1: every weight that it changes is the aligned model's again |
| export | merge, subtract, extract |
"""


def page() -> str:
    """The text of docs/models.md."""
    parts = [INTRODUCTION]
    notes = {pattern: number for number, pattern in enumerate(dict.fromkeys(REFUSED.values()), 1)}
    for kind, names in KINDS.items():
        rows = [["architecture", *COLUMNS, "left out of a patch"]]
        for name in names:
            refused = [REFUSED.get((name, cell)) for cell in COLUMNS]
            marks = [f"({notes[pattern]})" if pattern else "yes" for pattern in refused]
            rows.append([f"`{name}`", *marks, ", ".join(f"`{each}`" for each in sorted(LEFT_OUT.get(name, ())))])
        lines = [f"| {' | '.join(row)} |" for row in rows]
        parts.append("\n".join([f"## {kind}\n", lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n")
    parts.append("\n".join(f"({number}) Refused: {SAYS[pattern]}." + "\n" for pattern, number in notes.items()))
    return "\n".join(parts).rstrip("\n") + "\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("Give --write, which writes docs/models.md.")
    PAGE.write_text(page(), encoding="utf-8")
