"""The repair methods, one file each, and the one table that names them."""

from oneshot.patch.method import Method
from oneshot.patch.methods import lora, lowrank, project, rollback, sft

METHODS: dict[str, Method] = {
    method.name: method for method in (rollback.METHOD, lowrank.METHOD, project.METHOD, sft.METHOD, lora.METHOD)
}
"""By name. ``auto`` takes the first that has a reason to be taken and what it needs."""
