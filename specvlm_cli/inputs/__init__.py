"""INPUT arguments to items: folders, files, globs, stdin and manifests in, one item for each video out."""

from specvlm_cli.inputs.item import Item, item_id
from specvlm_cli.inputs.options import EXTENSIONS, InputOptions, InputReport
from specvlm_cli.inputs.sources import Inputs
from specvlm_cli.inputs.values import MOST_PROMPTS

__all__ = ["EXTENSIONS", "MOST_PROMPTS", "InputOptions", "InputReport", "Inputs", "Item", "item_id"]
