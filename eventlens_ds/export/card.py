"""README.md of an exported folder: a model card with what is known, and nothing else.

In: the checkpoint, its configuration and what `folder` recorded. Out: Markdown with the YAML header of the Hub.
Decision: numbers come only from evaluations of this very checkpoint that lie in its run folder, each with its
conditions; results on the embedded world are labelled as such, and without an evaluation the card says so (P13).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from eventlens_ds.config.run_config import RunConfig
from eventlens_ds.eval import report
from eventlens_ds.model.peft_folder import MOA, PARTS

log = logging.getLogger(__name__)

TAGS = ("vision-language", "region-grounding", "visual-commonsense-reasoning", "eventlens_ds")

_USE = """```python
from transformers import AutoModel, AutoProcessor
import eventlens_ds.model  # registers the classes

model = AutoModel.from_pretrained("{name}").eval()
processor = AutoProcessor.from_pretrained("{name}")
batch = processor("photo.jpg", boxes=[[10, 20, 50, 80]], names=["person"],
                  question="What is [1] doing?", choices=["waiting", "running"])
token_logp = model(batch)
```

or `eventlens predict {name} photo.jpg --boxes person:10,20,50,80 --question "What is [1] doing?"`.
"""


_USE_LORA = """LoRA alone, on the language model, without eventlens_ds (no images, regions or task adapters):

```python
from peft import PeftModel
from transformers import {base_class}

model = PeftModel.from_pretrained({base_class}.from_pretrained("{base}"), "{name}")
```

"""

_USE_MOA = """The adapters alone, on the language model (no images or regions{without}); each row says its task:

```python
from peft import PeftModel
from transformers import {base_class}
import eventlens_ds.model  # makes PEFT know the type
from eventlens_ds.model.peft_moa import task_ids

model = PeftModel.from_pretrained({base_class}.from_pretrained("{base}"), "{name}/{moa}")
model(input_ids=ids, moa_task_ids=task_ids(["caption"]))
```

"""

_USE_PEFT = """All of it: the published weights, LoRA and adapters as far as there are any, and what `{parts}/` holds
(projector, region encoder, and whatever else was trained):

```python
from transformers import AutoModel, AutoProcessor
import eventlens_ds.model  # registers the classes

model = AutoModel.from_pretrained("{name}/{parts}")
processor = AutoProcessor.from_pretrained("{name}/{parts}")
```

The published weights are looked for at {places}; `AutoModel.from_pretrained(..., {field}=DIR)` names another place.
Their sha256 must be that of export.json.
"""


def text(name: str, path: Path, config: RunConfig, facts: Mapping[str, Any]) -> str:
    """The card. path: the checkpoint; facts: see `folder` and, of a PEFT folder, `peft_folder`."""
    header: dict[str, Any] = {
        "license": "other" if facts["published_weights"] else "apache-2.0",
        "library_name": "peft" if "peft" in facts else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": list(TAGS),
    }
    if "peft" in facts:
        header["base_model"] = Path(peft_base(facts)[1]).name
    if facts["published_weights"]:
        header["license_name"] = "license-of-the-base-models"
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {name}\n",
        _about(config, facts),
        f"## Use\n\n{_use_peft(name, facts) if 'peft' in facts else _USE.format(name=name)}",
        _training(path, config, facts),
        _results(path, facts),
    ]
    return "\n".join(parts)


def peft_base(facts: Mapping[str, Any]) -> tuple[str, str]:
    """(field of config.ModelConfig, folder) of the model that LoRA of a PEFT folder belongs to."""
    places = facts["peft"]["base"]
    field = "language_path" if "language_path" in places else "init_from"
    return field, places[field]


def _use_peft(name: str, facts: Mapping[str, Any]) -> str:
    field, base = peft_base(facts)
    base_class = "AutoModelForCausalLM" if field == "language_path" else "AutoModelForImageTextToText"
    places = ", ".join(f"`{place}` ({key})" for key, place in facts["peft"]["base"].items())
    held = facts["peft"]["tensors"]
    told = (_USE_LORA if held["lora"] else "") + (_USE_MOA if held["adapters"] else "") + _USE_PEFT
    without = ", no LoRA" if held["lora"] else ""
    return told.format(
        name=name, base=base, base_class=base_class, field=field, places=places, parts=PARTS, moa=MOA, without=without
    )


def _about(config: RunConfig, facts: Mapping[str, Any]) -> str:
    lines = [
        f"A RegionVLM of eventlens_ds ({facts['parameters']:,} parameters, {facts['dtype']}): a vision tower, region "
        "features linked to the words that name them, and a language model with one adapter per task.",
        "",
    ]
    if "peft" in facts:
        held = facts["peft"]["parameters"]
        lines.append(
            f"Of these this folder holds LoRA of rank {config.model.lora.rank} ({held['lora']:,} parameters) and "
            f"adapters ({held['adapters']:,}) as PEFT writes them, and {held['other']:,} parameters of other parts. "
            "The published weights are not in it; their licenses apply to the whole."
        )
    elif facts["published_weights"]:
        folders = (config.model.vision_path, config.model.language_path, config.model.init_from)
        names = ", ".join(Path(folder).name for folder in folders if folder)
        lines.append(f"It contains published weights ({names}); their licenses apply to this folder.")
    else:
        lines.append(f"Trained from random weights (preset {config.model.preset}).")
    if facts["lora_merged"]:
        lines.append(f"LoRA of rank {config.model.lora.rank} is merged into {facts['lora_merged']} matrices.")
    return "\n".join([*lines, ""])


def _training(path: Path, config: RunConfig, facts: Mapping[str, Any]) -> str:
    data = ", ".join(f"{Path(folder).name} ({source_of(folder)})" for folder in config.data.train)
    rows = [
        ("checkpoint", f"{facts['checkpoint']} (manifest sha256 {facts['checkpoint_sha256'][:16]})"),
        ("configuration", facts["config_hash"]),
        ("data", data or "not recorded"),
        ("tasks", ", ".join(config.data.tasks) or "all of the data"),
        ("parts trained last", ", ".join(config.stage.train)),
        ("steps", f"{facts['step']} of {config.train.rows_per_step} rows of up to {config.data.row_tokens} tokens"),
        ("linking of regions", config.model.linking),
        ("started from", Path(config.io.init_from).name if config.io.init_from else "-"),
        ("versions", ", ".join(f"{k} {facts['versions'][k]}" for k in ("eventlens_ds", "torch", "transformers"))),
    ]
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows)
    return f"## Training\n\n| | |\n|---|---|\n{table}\n"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _results(path: Path, facts: Mapping[str, Any]) -> str:
    found = list(_evaluations(path.parent.parent, facts["checkpoint_sha256"]))
    if not found:
        return "## Results\n\nThis checkpoint has not been evaluated in its run folder.\n"
    parts = ["## Results\n"]
    for name, metrics, facts_of in found:
        source = source_of(str(facts_of.get("data", "")))
        about = [f"data {Path(str(facts_of.get('data', '?'))).name} ({source})", f"split {facts_of.get('split', '?')}"]
        if facts_of.get("limit_images"):
            about.append(f"first {facts_of['limit_images']} images")
        about += [str(facts_of[key]) for key in ("dtype", "date") if key in facts_of]
        parts.append(f"{'; '.join(about)}\n")
        if source == "world":
            parts.append(
                "These are results on the embedded synthetic world, a diagnostic. They are **not** results on VCR or "
                "VisualCOMET.\n"
            )
        parts.append(f"```\n{report.table({name: metrics})}```\n")
    return "\n".join(parts)


def _evaluations(run: Path, checkpoint_sha256: str) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(name, metrics, conditions) of every evaluation of the checkpoint whose files can be read."""
    for file in sorted([*run.glob("metrics/*.json"), *run.glob("eval/*/metrics/*.json")]):
        try:
            metrics = json.loads(file.read_text(encoding="utf-8"))
            conditions = metrics.pop(report.CONDITIONS, None) or {}
            if conditions.get("checkpoint_sha256") != checkpoint_sha256:
                continue
            # What a table cannot show is no metrics file of ours.
            report.table({file.stem: metrics})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: not in the model card: %s", file, error)
            continue
        yield file.stem, metrics, conditions


def source_of(folder: str) -> str:
    """Which source a data folder was built from ("world", "vcr", ...), or that it is not known."""
    try:
        return str(json.loads(Path(folder, "dataset.json").read_text(encoding="utf-8"))["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return "source not recorded"
