"""How the files of checkpoints, adapters and what is ours beside them are called."""

from __future__ import annotations

CONFIG = "config.json"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
MANIFEST = "manifest.json"  # sizes of files and checksums of tensors, in what oneshot writes
MARKER = "SAFETY_DEGRADED.json"
IDENTITY = "oneshot_patch.json"  # which checkpoint a patch belongs to
CARD, EXPORT = "README.md", "oneshot_export.json"
CHAT_TEMPLATE = "chat_template*"
MORE_TEMPLATES = "additional_chat_templates"  # a folder, of a tokenizer with several
# of the tokenizer, as patterns
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "spiece.model",
    "sentencepiece*", "tekken.json", "*.tiktoken", CHAT_TEMPLATE,
)  # fmt: skip
