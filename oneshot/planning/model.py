"""The model that is planned for: where its config.json is found, and what that says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneshot.checkpoint.adapters.bases import named_base
from oneshot.checkpoint.disk.files import (
    TensorEntry,
    is_adapter,
    list_tensors,
    local_folder,
    read_json,
    weights_file,
)
from oneshot.checkpoint.disk.seal import CONFIGS, check_sealed
from oneshot.checkpoint.loading.configs import config_fields
from oneshot.checkpoint.quantized.scheme import QUANTIZATION, is_left_over, is_stored, stored_dtype
from oneshot.errors import UserError
from oneshot.online import say_fetching
from oneshot.planning.lookup import model_shape
from oneshot.planning.shapes import FP32, NF4, NF4_DOUBLE, ModelShape, stored_bytes
from oneshot.reading import read_object
from oneshot.settings import ModelSettings, Settings
from oneshot.shipped import root

SCALED = ("mxfp4", "fp8")


@dataclass(frozen=True)
class PlannedModel:
    """A model as it is planned for: its name, shape, and whether an update of its own (an adapter) is known.

    ``stored_as`` is how its files hold it, see ``stored_bytes``; ``item`` the bytes of a number that is computed with
    where the settings ask for no dtype.
    """

    name: str
    shape: ModelShape
    adapter: bool = False
    stored_as: str = ""
    item: int = 2


def read_model(settings: Settings) -> PlannedModel:
    """Read the shape of the model that the settings name, from its config.json and, where there, its files' headers.

    Of a Hub id nothing but its config.json is downloaded, and not even that where the fields that a shape depends on
    ship beside the settings of its name.

    Raises:
        UserError: no model named, no config.json to be had, or one that transformers cannot build
    """
    name, revision = settings.model.path, settings.model.revision
    if name is None:
        raise UserError("There is nothing to plan: name a folder, a config.json or a Hub id with --model.path.")
    path = local_folder(name) or Path(name).expanduser()
    adapter = path.is_dir() and is_adapter(path)
    if adapter:
        name, revision, _ = named_base(path, settings.model.base, settings.model.base_revision)
        path = local_folder(name) or Path(name).expanduser()
    if path.is_dir():
        weights = list_tensors(path) if weights_file(path) else None
        check_sealed(path, CONFIGS)
        config = config_fields(path)
        found = model_shape(config, weights, own_code(settings.model, config, path))
        return PlannedModel(name, found, adapter, *_stored(config, weights))
    if path.is_file():
        config = read_object(path)
        found = model_shape(config, remote=own_code(settings.model, config, path.parent))
        return PlannedModel(name, found, adapter, *_stored(config))
    known = read_json(root() / "launch" / "runs" / "shapes.json")
    config = known.get(name) or read_object(_from_hub(name, revision))
    return PlannedModel(name, model_shape(config), adapter, *_stored(config))


def _stored(config: dict[str, Any], tensors: dict[str, TensorEntry] | None = None) -> tuple[str, int]:
    """How the files hold a model, of the forms whose size is planned ("" for any other), and bytes of a number.

    Args:
        tensors: of the files; none: they are not here, and it is as the config says
    """
    text = config.get("text_config") or {}
    said = next((part[key] for part in (config, text) for key in ("dtype", "torch_dtype") if part.get(key)), "")
    item = 4 if (stored_dtype(config, tensors) if tensors else said) == "float32" else 2
    named = config.get(QUANTIZATION) or text.get(QUANTIZATION) or {}
    if tensors is not None and is_left_over(config, tensors):
        named = {}
    if isinstance(named, Mapping) and named.get("load_in_4bit") and is_stored(config):
        return NF4_DOUBLE if named.get("bnb_4bit_use_double_quant") else NF4, item
    method = named.get("quant_method") if isinstance(named, Mapping) else None
    return method if method in SCALED else FP32 if item == 4 and not named else "", item


def compared_bytes(model: PlannedModel) -> int:
    """Return the bytes that are read for the fine-tune's own update: what a patch reaches, in both checkpoints."""
    return 2 * stored_bytes(model.shape, model.stored_as, reached=True)


def own_code(settings: ModelSettings, config: Mapping[str, Any], folder: Path) -> Path | None:
    """Return the folder of a model that is to run its own code; none for transformers' models."""
    return folder if settings.trust_remote_code and "auto_map" in config else None


def _from_hub(name: str, revision: str | None) -> Path:
    """The config.json of a Hub id, alone."""
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"The model {name} does not exist: give a folder, a config.json or a Hub id (owner/name).")
    say_fetching("config.json of the model", name, revision=revision)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"The config.json of {name} is neither here nor to be had from the Hub ({type(error).__name__}): "
            "download it, and give its path as --model.path."
        ) from error
