"""What becomes of a repair: fine-tuned again, sampled, or in fewer bits; beside the aligned model, treated alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realmodels.attacks import Training, parts_of, trainings
from realmodels.cells import AGAIN, ALIGNED, BF16, INT8, NF4, SAMPLED, Cell
from realmodels.methods import keep_patch, load, patch_folder, repair_values
from realmodels.models import make_aligned
from realmodels.scoring import BATCH, NEW_TOKENS, Material, Result, judged
from realmodels.subject import Subject, finetune, make_subject

if TYPE_CHECKING:
    import torch

    from oneshot.distributed.runtime import Runtime
    from oneshot.measure.rates import Probe

LATER = 500  # seed of what is trained on again: other rows than any attack's
TEMPERATURE = 0.7


def measure_after(
    runtime: Runtime, cache: Path, cell: Cell, material: Material, probes: Sequence[Probe], scratch: Path
) -> Result:
    """Return ``verdicts`` and ``task``, as of ``scoring.score``, of a model after what the cell names.

    Args:
        scratch: folder for what is written on the way; the caller removes it
    """
    clock = time.monotonic()
    folder = make_aligned(runtime, cache, cell.model)
    if cell.method != ALIGNED:
        folder = _repaired(runtime, cache, make_subject(runtime, cache, cell), scratch)
    if cell.after.endswith(" steps"):
        folder = finetune(folder, scratch / "again", parts_of(*_again(cell)), _longer(cell), LATER)
    model, tokenizer = load(runtime, folder, quantize="nf4" if cell.after == NF4 else None)
    if cell.after in (INT8, BF16):
        rounded(model, cell.after)
    answers = _answers(runtime, model, tokenizer, probes, sampled=cell.after == SAMPLED)
    return {**judged(material, probes, answers), "seconds": round(time.monotonic() - clock, 1)}


def _repaired(runtime: Runtime, cache: Path, subject: Subject, scratch: Path) -> Path:
    """The default repair's merged checkpoint, from the patch that was kept, or repaired anew."""
    from oneshot import api

    patch = patch_folder(cache, subject)
    if not patch.is_dir():
        done = api.repair(**repair_values(subject, subject.cell.method, scratch / "repair"))
        patch = keep_patch(done.patch_folder, cache, subject)
    base = subject.aligned if subject.cell.training == "lora" else subject.folder
    return api.export(scratch / "repaired", model=str(base), adapters=[str(patch)]).folder


def _again(cell: Cell) -> tuple[str, int]:
    """The attack that is made again, and its seed."""
    return AGAIN[cell.after.split(",")[0]], LATER


def _longer(cell: Cell) -> Training:
    """The training of the attack, all weights, with as many steps as the cell says."""
    training = trainings(cell.model)["full"]
    return Training(training.method, int(cell.after.split()[1]), training.learning_rate, training.batch_size)


def rounded(model: Any, form: str) -> None:
    """Round a model's weights in place: linear layers' to 8 bits row by row, as LLM.int8 keeps them; or all to bf16.

    It computes in its own dtype: what is shown is what the rounding does, on a CPU without instructions for either.
    """
    import torch

    head = model.get_output_embeddings()
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if form == BF16:
                    parameter.copy_(parameter.to(torch.bfloat16))
                elif isinstance(module, torch.nn.Linear) and module is not head and parameter.ndim == 2:
                    parameter.copy_(to_int8(parameter))


def to_int8(weight: torch.Tensor) -> torch.Tensor:
    """Return a matrix (m, n) rounded to 255 levels of each row, the largest of which is the row's largest weight."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round() * scale


def _answers(runtime: Runtime, model: Any, tokenizer: Any, probes: Sequence[Probe], *, sampled: bool) -> list[str]:
    """Greedy answers to all probes, or answers drawn at ``TEMPERATURE``, with a seed."""
    import torch

    from oneshot.data.encoding import encode_prompt
    from oneshot.measure.generate import evaluating, generate_answers

    asked = [list(probe.messages) for probe in probes]
    if not sampled:
        return generate_answers(model, tokenizer, asked, runtime, max_new_tokens=NEW_TOKENS, batch_size=BATCH)
    torch.manual_seed(0)
    said = []
    with evaluating(model), torch.no_grad():
        for messages in asked:  # one at a time: nothing is padded
            ids = torch.tensor([encode_prompt(messages, tokenizer)], device=model.device)
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=TEMPERATURE, top_k=0,
                top_p=1.0, max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            said.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return said
